"""Candidates of the compute benchmark, each in a separate process.

The processes are separate because a recipe configures memory pages and float32 on a GPU, and because peak
memory is measured per process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.layers import Layer, layers_alone
from benchmarks.timing import synchronize, timed
from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.engines import make_engine, wrap_model
from cosmoflow_dali.compute.kernels import choose_kernels, use_kernels
from cosmoflow_dali.compute.optim import SGDConfig, build_optimizer, set_lr
from cosmoflow_dali.compute.step import autocast, input_dtype, make_scaler
from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.models.blocks import LEAK
from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.distributed.world import available_cores
from pipelines.errors import UserError
from pipelines.sample import Batch, SampleSpec

Network = Literal["reference", "open"]
_Prepared = tuple[Callable[[], None], Callable[[], torch.Tensor], nn.Module, Batch]
Timing = tuple[float, float, float]
"""Seconds per step: wall time, CPU time, and wall time of the forward pass alone."""

_LEAD = 10
"""Warm-up steps of a round on a GPU."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to take training steps.

    Attributes:
        compute: Precision and engine.
        plain: Use torch's modules and defaults instead of the project's.
        layout: Memory format.
        optimizer: "default" is torch.optim.SGD with defaults; for others see `SGDConfig.implementation`.
        data: Folder of samples that the loader reads during the steps; None for resident data.
    """

    name: str
    batch_size: int
    compute: ComputeConfig
    plain: bool = False
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    optimizer: Literal["default", "auto", "apex", "fused"] = "auto"
    data: Path | None = None


class PlainReference(CosmoFlow):
    """The reference network in plain torch operations."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Return targets (B, 4), as `CosmoFlow.forward`."""
        hidden = volume
        for conv in self.convs:
            hidden = functional.max_pool3d(functional.leaky_relu(conv(hidden), LEAK), 2)
        hidden = hidden.permute(0, 2, 3, 4, 1).flatten(1)
        for dense in self.denses[:-1]:
            hidden = functional.leaky_relu(dense(hidden), LEAK)
            hidden = functional.dropout(hidden, self.config.dropout, self.training)
        return 1.2 * torch.tanh(self.denses[-1](hidden))


class PlainOpen(OpenCosmoFlow):
    """The open network in plain torch operations."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Return targets (B, 4), as `OpenCosmoFlow.forward`."""
        hidden = (volume - self.input_mean) / self.input_std
        for conv, norm in zip(self.convs, self.norms, strict=True):
            wrapped = functional.pad(hidden, (1,) * 6, mode="circular")
            hidden = functional.avg_pool3d(functional.leaky_relu(norm(conv(wrapped)), LEAK), 2)
        hidden = functional.leaky_relu(self.denses[0](hidden.mean(dim=(2, 3, 4))), LEAK)
        return 1.2 * torch.tanh(self.denses[1](hidden))


def shape_of(network: Network, size: int) -> ReferenceConfig | OpenConfig:
    """Return the network's configuration at `size`: the benchmark's from 64 on, a smaller one below."""
    if network == "open":
        return OpenConfig(size=size)
    if size >= 64:
        return ReferenceConfig(size=size)
    return ReferenceConfig(size=size, blocks=4, filters=8, dropout=0.0)


class RecipeProcess:
    """Process that takes steps of a recipe on request."""

    def __init__(self, recipe: Recipe, network: Network, size: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        arguments = (remote, recipe, network, size, device)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        remote.close()

    def wait(self) -> None:
        """Wait until the process is ready; raise the UserError if it could not start."""
        answer = self._pipe.recv()
        if isinstance(answer, UserError):
            raise answer

    def take_steps(self, steps: int) -> Timing:
        """Take `steps` steps and return their timing."""
        self._pipe.send(steps)
        return self._pipe.recv()

    def peak(self) -> int:
        """Return the peak memory of the steps in bytes: on the GPU, or of the process above its start."""
        self._pipe.send("peak")
        return self._pipe.recv()

    def layers(self) -> list[Layer]:
        """Return figures of the single convolution blocks."""
        self._pipe.send("layers")
        return self._pipe.recv()

    def profile(self, path: str) -> None:
        """Write a trace of three steps to `path`, for chrome://tracing or perfetto."""
        self._pipe.send(("profile", path))
        self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send("end")
        self._process.join()


def _serve(requests: Connection, recipe: Recipe, network: Network, size: int, where: str) -> None:
    # The choice of kernels, for the benchmark's output.
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(where)
    # The record's program sets it, too.
    torch.backends.cudnn.benchmark = recipe.compute.engine == "graph"
    if not recipe.plain:
        configure_torch(device, available_cores(), recipe.compute.precision)
    with contextlib.ExitStack() as held:
        start = _peak_memory()
        try:
            prepared = _prepare(recipe, network, size, device, held)
        except UserError as error:
            requests.send(error)
            return
        _answer(requests, recipe, device, prepared, start)


def _answer(
    requests: Connection, recipe: Recipe, device: torch.device, prepared: _Prepared, start: int
) -> None:
    """Answer requests until "end"; `start` is the peak memory in bytes before `prepared` was made."""
    step, forward, model, batch = prepared
    if device.type == "cuda":
        # The choice of kernels takes more than a step.
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    with torch.no_grad():
        forward()
    requests.send("ready")
    while (request := requests.recv()) != "end":
        if request == "layers":
            requests.send(list(layers_alone(model, batch, recipe.compute, plain=recipe.plain)))
        elif request == "peak":
            gpu = device.type == "cuda"
            requests.send(torch.cuda.max_memory_allocated() if gpu else _peak_memory() - start)
        elif isinstance(request, tuple):
            with torch.profiler.profile(record_shapes=True) as trace:
                for _ in range(3):
                    step()
                synchronize(device)
            trace.export_chrome_trace(request[1])
            requests.send("written")
        else:
            if device.type == "cuda":
                # Other processes used the GPU in between.
                timed(step, _LEAD, device)
            wall, cpu = timed(step, request, device)
            with torch.no_grad():
                alone, _ = timed(forward, max(1, request // 2), device)
            requests.send((wall / request, cpu / request, alone / max(1, request // 2)))


def _prepare(
    recipe: Recipe, network: Network, size: int, device: torch.device, held: contextlib.ExitStack
) -> _Prepared:
    """Return a whole step, a forward pass, the model and the resident batch; `held` closes the loader."""
    shape = shape_of(network, size)
    model: nn.Module = build_model(shape, seed=0, checkpoint_blocks=recipe.compute.checkpoint_blocks)
    if recipe.plain:
        model = PlainOpen(shape) if isinstance(shape, OpenConfig) else PlainReference(shape)
    layout = torch.channels_last_3d if recipe.layout == "channels_last" else torch.contiguous_format
    model = model.to(device).to(memory_format=layout).train()  # type: ignore[call-overload]
    compute = recipe.compute
    if not recipe.plain:
        names = choose_kernels(model, compute.kernels, compute.precision, recipe.batch_size, device)
        use_kernels(model, names, compute.precision, recipe.batch_size)
    # Like logarithms of counts, half of them zeros.
    generator = torch.Generator().manual_seed(1)
    volume = torch.rand(recipe.batch_size, size, size, size, 4, generator=generator).sub_(0.5).clamp_(0)
    volume = volume.permute(0, 4, 1, 2, 3).contiguous(memory_format=layout)
    if not recipe.plain:
        volume = volume.to(input_dtype(recipe.compute.precision))
    target = torch.rand(recipe.batch_size, 4, generator=generator)
    batch = Batch(volume.to(device), target.to(device), np.arange(recipe.batch_size))
    scaler = make_scaler(recipe.compute.precision, device)
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if recipe.optimizer == "default"
        else build_optimizer(
            SGDConfig(implementation=recipe.optimizer), model, compute.precision, compute.engine_on(device)
        )
    )
    parallel = wrap_model(model, recipe.compute, device, ranks=1)
    spec = SampleSpec(size)
    engine = make_engine(
        parallel, recipe.compute, optimizer, scaler, (recipe.batch_size, *spec.shape), device
    )

    if engine.inputs is not None:
        engine.inputs.volume.copy_(batch.volume)
        engine.inputs.target.copy_(batch.target)
        batch = engine.inputs
    coming: Iterator[Batch] = itertools.repeat(batch)
    if recipe.data is not None:
        coming = _read(recipe.data, recipe.batch_size, device, engine.inputs, held)

    def step() -> None:
        if recipe.optimizer != "default":
            set_lr(optimizer, 1e-3)
        engine(next(coming))

    def forward() -> torch.Tensor:
        with autocast(recipe.compute.precision, device):
            answer: torch.Tensor = parallel(batch.volume)
        return answer

    return step, forward, model, batch


def _read(
    folder: Path, batch_size: int, device: torch.device, into: Batch | None, held: contextlib.ExitStack
) -> Iterator[Batch]:
    """Return endless batches of the samples in `folder`, as in training."""
    # Needs packages that resident data does not.
    from pipelines.dataset.open import open_folder
    from pipelines.loading.config import LoaderConfig
    from pipelines.loading.loader import Loader
    from pipelines.plan import RankSlice

    loader = Loader(
        open_folder(folder),
        LoaderConfig(batch_size),
        rank_slice=RankSlice(),
        seed=0,
        shuffle=True,
        ragged="drop",
        device=device,
    )
    held.enter_context(contextlib.closing(loader))
    return itertools.chain.from_iterable(loader.batches(epoch, into=into) for epoch in itertools.count())


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
