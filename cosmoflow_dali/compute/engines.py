"""How a step's gradients are computed: as written, replayed from a CUDA graph, or compiled.

All engines call the same `forward_backward`; they differ in who launches its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cosmoflow_dali.compute.step import Precision, forward_backward, input_dtype
from cosmoflow_dali.models.reference import CosmoFlow
from pipelines.errors import ConfigError
from pipelines.sample import PARAMETERS, Batch, SampleSpec

_WARM_UP = 11
"""Steps before a capture: what torch's documentation asks for where ranks reduce gradients."""


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """Numerics and execution of a training step.

    Args:
        precision: Numbers of the forward and backward pass; weights and optimizer stay float32.
        engine: "eager"; "graph", one CUDA graph of forward, backward and all-reduce; "compile",
            torch.compile. The last two require a GPU. "auto" is eager.
        micro_batch: Samples processed at a time, to save memory; must divide loader.batch_size.
        exchange: Data type of the gradient all-reduce.
        first_block: "triton" computes the reference network's first block in one kernel, on a GPU.
        nvtx: Mark forward, backward, update and every operation for Nsight, on a GPU; slows training.
    """

    precision: Precision = "fp32"
    engine: Literal["auto", "eager", "graph", "compile"] = "auto"
    micro_batch: int | None = None
    exchange: Literal["fp32", "bf16"] = "fp32"
    first_block: Literal["plain", "triton"] = "plain"
    nvtx: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError("micro_batch", self.micro_batch, "must be at least 1")

    def engine_on(self, device: torch.device) -> str:
        """Which engine that is on `device`; ConfigError where it cannot be."""
        gpu = device.type == "cuda"
        if self.nvtx and not gpu:
            raise ConfigError("compute.nvtx", self.nvtx, f"is for GPUs; leave it out on {device.type}")
        if self.engine in ("auto", "eager"):
            return "eager"
        if not gpu:
            raise ConfigError(
                "compute.engine", self.engine, f"needs a GPU; on {device.type} use eager or auto"
            )
        return self.engine


class Engine(Protocol):
    """Leaves a batch's gradients in the model, and nothing of an earlier batch's.

    inputs: where it reads its batches, for the loader to write into; None where it takes any.
    """

    inputs: Batch | None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The loss, (), on the device."""


def wrap_model(model: nn.Module, config: ComputeConfig, device: torch.device, *, ranks: int) -> nn.Module:
    """`model` as the engine wants it: its gradients averaged over `ranks` while backward still runs."""
    if config.first_block == "triton":
        if not isinstance(model, CosmoFlow) or device.type != "cuda":
            reason = f"is for the reference network on a GPU, not {type(model).__name__} on {device.type}"
            raise ConfigError("compute.first_block", config.first_block, reason)
        model.fuse_first_block()
    if config.engine_on(device) == "compile":
        model = torch.compile(model)  # type: ignore[assignment]
    if ranks == 1:
        return model
    # DDP's hooks belong to the stream that it is made on: for a graph, the one that is captured.
    with _capture_stream(device) if config.engine_on(device) == "graph" else nullcontext():
        parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if config.exchange == "bf16":
        parallel.register_comm_hook(None, lambda state, bucket: _allreduce_bf16(bucket))
    return parallel


def _allreduce_bf16(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """DDP's hook for a bucket of gradients, half as long on the wire; torch's own asks for NCCL."""
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: gradients.copy_(done.value()[0]))


def make_engine(
    model: nn.Module,
    config: ComputeConfig,
    scaler: torch.amp.GradScaler,
    spec: SampleSpec,
    batch_size: int,
    device: torch.device,
) -> Engine:
    """The engine of `config` for `model`, which `wrap_model` has made, and batches of `batch_size`."""

    def gradients(batch: Batch) -> torch.Tensor:
        return forward_backward(model, batch, config.precision, scaler, config.micro_batch)

    if config.engine_on(device) != "graph":
        return Eager(model, gradients)
    size, channels = spec.size, spec.channels
    volume = torch.zeros(
        batch_size, size, size, size, channels, dtype=input_dtype(config.precision), device=device
    )
    target = torch.zeros(batch_size, len(PARAMETERS), device=device)
    index = np.full(batch_size, -1)
    return Graph(model, gradients, Batch(volume.permute(0, 4, 1, 2, 3), target, index))


class Eager:
    """Kernel by kernel, as torch is asked for them."""

    inputs: Batch | None = None

    def __init__(self, model: nn.Module, gradients: Callable[[Batch], torch.Tensor]) -> None:
        self._model, self._gradients = model, gradients
        self._settled = not isinstance(model, DistributedDataParallel)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """See `Engine`."""
        if not self._settled:
            # Behind its first backward DDP regroups the gradients, and with the group the order changes in
            # which three ranks or more are summed: a resumed run would round its first step otherwise.
            with _preserve_state(self._model, batch.volume.device):
                self._gradients(batch)
            self._settled = True
        self._model.zero_grad(set_to_none=True)
        return self._gradients(batch)


class Graph:
    """One CUDA graph, captured at the first batch and replayed from then on."""

    def __init__(self, model: nn.Module, gradients: Callable[[Batch], torch.Tensor], inputs: Batch) -> None:
        self.inputs: Batch | None = inputs
        self._static = inputs
        self._model, self._gradients = model, gradients
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros(())

    def __call__(self, batch: Batch) -> torch.Tensor:
        """See `Engine`."""
        for mine, given in ((self._static.volume, batch.volume), (self._static.target, batch.target)):
            if given is not mine:
                mine.copy_(given)
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        # The next replay writes where this one has.
        return self._loss.clone()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record the step."""
        device = self._static.volume.device
        graph = torch.cuda.CUDAGraph()
        with _preserve_state(self._model, device):
            with _capture_stream(device):
                for _ in range(_WARM_UP):
                    self._model.zero_grad(set_to_none=True)
                    self._gradients(self._static)
            # Absent, they are made in the graph's own memory, and every replay writes them anew.
            self._model.zero_grad(set_to_none=True)
            # DALI's threads ask for memory meanwhile, which a capture must not mind.
            with torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
                self._loss = self._gradients(self._static)
        return graph


@contextmanager
def _preserve_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Steps in the body change gradients, and nothing else that the model or the random state remembers."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one beside `device`'s current stream on which graphs are warmed up and captured."""
    return torch.cuda.Stream(device)


@contextmanager
def _capture_stream(device: torch.device) -> Iterator[None]:
    """`_stream` is the current one in the body, behind what was asked before, and before what follows."""
    beside = _stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        yield
    torch.cuda.current_stream(device).wait_stream(beside)
