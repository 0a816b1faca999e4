"""Engines that execute a training step: eager, a replayed CUDA graph, or torch.compile.

All engines call the same `forward_backward` and optimizer; they differ in how their kernels are launched.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.optim import capturable, why_outside_graph
from cosmoflow_dali.compute.step import forward_backward, input_dtype
from pipelines.errors import ConfigError
from pipelines.sample import PARAMETERS, Batch

logger = logging.getLogger(__name__)

_WARM_UP = 11
"""Warm-up steps before a capture, as torch's documentation requires for DistributedDataParallel."""


def wrap_model(model: nn.Module, config: ComputeConfig, device: torch.device, *, ranks: int) -> nn.Module:
    """Prepare `model` for the engine of `config`; over several `ranks`, average gradients during backward.

    Raises:
        ConfigError: `config` requires a GPU.
    """
    if ranks > 1 and device.type == "cuda":
        # Averages the statistics of batch normalisation over ranks; on a CPU, `norm_block` does.
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.engine_on(device) == "compile":
        model = torch.compile(model)  # type: ignore[assignment]
    if ranks == 1:
        return model
    # DDP's hooks use the stream that it is created on: for a graph, the captured one.
    with _capture_stream(device) if config.engine_on(device) == "graph" else nullcontext():
        parallel = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    if config.exchange == "bf16":
        parallel.register_comm_hook(None, lambda state, bucket: _allreduce_bf16(bucket))
    return parallel


def _allreduce_bf16(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients in bfloat16, as DDP's hook; torch's own hook requires NCCL."""
    gradients = bucket.buffer()
    reduced = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(reduced, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: gradients.copy_(done.value()[0]))


class Engine:
    """Updates the weights by a batch, launching each kernel as torch reaches it.

    Attributes:
        inputs: Batch that the engine reads, for the loader to write into; None if it accepts any batch.
    """

    inputs: Batch | None = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        gradients: Callable[[Batch], torch.Tensor],
    ) -> None:
        self._model, self._optimizer, self._scaler, self._gradients = model, optimizer, scaler, gradients
        self._warmed_up = not isinstance(model, DistributedDataParallel)

    def close(self) -> None:
        """Free what must be freed before the process group is."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Update the weights by `batch`, at the optimizer's rate; return the loss, (), on the device."""
        if not self._warmed_up:
            # After its first backward pass DDP regroups the gradients, which changes the order of sums over
            # three or more ranks: without this pass, a resumed run would round its first step differently.
            with self._preserve_state(batch.volume.device):
                self._gradients(batch)
            self._warmed_up = True
        self._model.zero_grad(set_to_none=True)
        loss = self._gradients(batch)
        self._update()
        return loss

    def _update(self) -> None:
        """Update the weights by the gradients."""
        with record_function("update"):
            self._scaler.step(self._optimizer)
            self._scaler.update()

    @contextmanager
    def _preserve_state(self, device: torch.device) -> Iterator[None]:
        """Restore weights, buffers, optimizer state and random state after the body; gradients may change."""
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        tensors = [*self._model.parameters(), *self._model.buffers(), *filter(torch.is_tensor, state)]
        copies = [tensor.detach().clone() for tensor in tensors]
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            with torch.no_grad():
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)


class GraphEngine(Engine):
    """Captures the step as a CUDA graph at the first batch and replays it for each batch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        gradients: Callable[[Batch], torch.Tensor],
        inputs: Batch,
        *,
        required: bool,
    ) -> None:
        """Prepare a graph; unless it is `required`, launch each kernel if it cannot be captured.

        Over several ranks it is required: a capture that fails on one of them breaks its exchange of
        gradients.
        """
        super().__init__(model, optimizer, scaler, gradients)
        self.inputs = self._static = inputs
        self._required, self._captures = required or isinstance(model, DistributedDataParallel), True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros(())
        # The graph reads the rate from here.
        self._lr, self._rate = torch.zeros((), device=inputs.target.device), 0.0
        reason = why_outside_graph(optimizer, scaler)
        self._includes_update = not reason
        if reason:
            logger.info("the CUDA graph leaves out the update: %s", reason)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Update the weights by `batch`, at the optimizer's rate; return the loss, (), on the device."""
        for static, tensor in ((self._static.volume, batch.volume), (self._static.target, batch.target)):
            if tensor is not static:
                static.copy_(tensor)
        if self._graph is None and self._captures:
            self._graph = self._capture()
        if self._graph is None:
            return super().__call__(self._static)
        if self._rate != (rate := self._optimizer.param_groups[0]["lr"]):
            self._lr.fill_(rate)
            self._rate = rate
        self._graph.replay()
        if not self._includes_update:
            self._update()
        # The next replay overwrites the loss.
        return self._loss.clone()

    def close(self) -> None:
        """Free the graph: NCCL's communicators wait for the graphs that captured them."""
        if self._graph is not None:
            self._graph.reset()
            self._graph, self._captures = None, False

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Return the step's graph; None if it cannot be captured and is not required."""
        device = self._static.volume.device
        graph = torch.cuda.CUDAGraph()
        with self._preserve_state(device):
            with _capture_stream(device):
                for _ in range(_WARM_UP):
                    self._model.zero_grad(set_to_none=True)
                    self._gradients(self._static)
                    if self._includes_update:
                        self._optimizer.step()
            # Missing gradients are allocated in the graph's memory, and each replay overwrites them.
            self._model.zero_grad(set_to_none=True)
            # DALI's threads allocate memory during the capture, which must not invalidate it.
            capture = functools.partial(torch.cuda.graph, capture_error_mode="thread_local")
            try:
                # The outer context restores the stream, which a capture that fails does not.
                with (
                    torch.cuda.stream(torch.cuda.current_stream(device)),
                    capture(graph, stream=_stream(device)),
                ):
                    self._loss = self._gradients(self._static)
                    if self._includes_update:
                        with capturable(self._optimizer, self._lr):
                            self._optimizer.step()
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                if self._required:
                    advice = f"the step cannot be captured ({reason}); use eager"
                    raise ConfigError("compute.engine", "graph", advice) from error
                logger.warning("the step cannot be captured as a CUDA graph (%s): eager engine", reason)
                # Torch's allocator still refers to it.
                self._captures, self._failed = False, graph
                # Torch 2.9 refuses to draw random numbers, as dropout does, until a capture succeeds.
                with capture(torch.cuda.CUDAGraph()):
                    torch.zeros((), device=device)
                return None
        return graph


def make_engine(
    model: nn.Module,
    config: ComputeConfig,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    shape: tuple[int, int, int, int, int],
    device: torch.device,
) -> Engine:
    """Return the engine of `config` for volumes of `shape`, (B, D, H, W, C).

    `model` is the result of `wrap_model`.
    """

    def gradients(batch: Batch) -> torch.Tensor:
        return forward_backward(model, batch, config.precision, scaler, config.micro_batch)

    if config.engine_on(device) != "graph":
        return Engine(model, optimizer, scaler, gradients)
    volume = torch.zeros(shape, dtype=input_dtype(config.precision), device=device)
    target = torch.zeros(shape[0], len(PARAMETERS), device=device)
    inputs = Batch(volume.permute(0, 4, 1, 2, 3), target, np.full(shape[0], -1))
    required = config.engine == "graph"
    return GraphEngine(model, optimizer, scaler, gradients, inputs, required=required)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which graphs of `device` are warmed up and captured."""
    return torch.cuda.Stream(device)


@contextmanager
def _capture_stream(device: torch.device) -> Iterator[None]:
    """Make `_stream` the current stream in the body, ordered after earlier and before later work."""
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)
