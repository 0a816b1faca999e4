"""Settings of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from cosmoflow_dali.compute.kernels import Kernels
from cosmoflow_dali.compute.step import Precision
from pipelines.errors import ConfigError, check_field


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """Numerics and execution of a training step.

    Args:
        precision: Numbers of the forward and backward pass; weights and optimizer stay float32.
        engine: "eager"; "graph", one CUDA graph of forward, backward, all-reduce and update (apex's, and that
            of fp16, follow the graph); "compile", torch.compile. The last two require a GPU. "auto" is a
            graph on a GPU, or eager if a single rank's step cannot be captured, with `nvtx`, and on a CPU.
        micro_batch: Samples processed at a time, to save memory; must divide loader.batch_size.
        checkpoint_blocks: Number of first blocks of the network that are computed in parts along D, and again
            in the backward pass instead of keeping their activations, to save memory.
        exchange: Data type of the gradient all-reduce.
        kernels: Those of the reference network's blocks on a GPU: "torch", "triton", or for each block the
            faster that agrees with float64 ("auto"); see `compute.kernels`.
        nvtx: Mark forward, backward, update and every operation for Nsight, on a GPU; slows training.
    """

    precision: Precision = "fp32"
    engine: Literal["auto", "eager", "graph", "compile"] = "auto"
    micro_batch: int | None = None
    checkpoint_blocks: int = 0
    exchange: Literal["fp32", "bf16"] = "fp32"
    kernels: Kernels = "auto"
    nvtx: bool = False

    def __post_init__(self) -> None:
        valid = self.micro_batch is None or self.micro_batch >= 1
        check_field(self, "micro_batch", valid, "must be at least 1")
        check_field(self, "checkpoint_blocks", self.checkpoint_blocks >= 0, "must be at least 0")
        if self.checkpoint_blocks and self.engine == "compile":
            advice = "the engine compile decides itself what to keep; use another, or 0"
            raise ConfigError("checkpoint_blocks", self.checkpoint_blocks, advice)

    def engine_on(self, device: torch.device) -> str:
        """Return the engine used on `device`.

        Raises:
            ConfigError: `device` does not support the settings.
        """
        gpu = device.type == "cuda"
        if self.nvtx and not gpu:
            raise ConfigError("compute.nvtx", self.nvtx, f"needs a GPU; leave it out on {device.type}")
        if self.engine == "auto":
            return "graph" if gpu and not self.nvtx else "eager"
        if self.engine == "eager":
            return "eager"
        if not gpu:
            reason = f"needs a GPU; on {device.type} use eager or auto"
            raise ConfigError("compute.engine", self.engine, reason)
        return self.engine
