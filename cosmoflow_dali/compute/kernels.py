"""Choice of the kernels of each convolution block of the reference network on a GPU.

Each candidate is checked against float64 on the run's own shapes, forward and backward, and those that agree
are timed. The fastest one is used. A candidate that fails to compile, to launch or to agree is left out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import nn

from cosmoflow_dali.compute.step import Precision, autocast, input_dtype
from cosmoflow_dali.models.blocks import pool_then_activate
from cosmoflow_dali.models.reference import Block, CosmoFlow
from pipelines.errors import ConfigError, UserError
from pipelines.sample import REDSHIFTS

Kernels: TypeAlias = Literal["auto", "torch", "triton"]

_TIMED_STEPS = 20
"""Most timed steps of a candidate."""

_LEAD_CYCLES = 50_000_000
"""Cycles by which a GPU starts later than Python, some 30 ms: it then runs steps in a row, as in a graph."""

_CHECKED_EDGE = 128
"""Largest edge that is checked: in float64, larger volumes may not fit in a GPU's memory."""

_SECONDS = 2.0
"""Time limit of all timed steps of a network."""

_ROUNDING: Mapping[str, float] = {"fp32": 1e-5, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7}
"""Tolerance of a candidate, relative to the norm of the float64 result: twice the spacing of its numbers."""

logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """Shape of a block: samples, input channels, filters, and edge of its input in voxels."""

    batch: int
    channels: int
    filters: int
    edge: int


def block_shapes(model: nn.Module, batch: int) -> list[Shape]:
    """Return the shapes of the blocks of `model` for `batch` samples at a time.

    There are none for the open network, nor where ranks share samples: torch computes the blocks of slabs.
    """
    if not isinstance(model, CosmoFlow) or model.group is not None:
        return []
    edge = model.config.size
    kernels = [conv.get_parameter("weight") for conv in model.convs]
    return [
        Shape(batch, kernel.shape[1], kernel.shape[0], edge >> number)
        for number, kernel in enumerate(kernels)
    ]


def candidates(number: int, shape: Shape, precision: Precision) -> dict[str, Block]:
    """Return the candidates for block `number` by name, that of torch first.

    Those of Triton are missing where Triton is not installed, or a kernel does not support the block.
    """
    found: dict[str, Block] = {"torch": pool_then_activate}
    try:
        from cosmoflow_dali.models import triton_block, triton_pool
    except ImportError:
        return found
    if triton_pool.supports(shape.filters, shape.batch, shape.edge):
        found["triton pool"] = triton_pool.pool_block
    # Triton computes float32 products without tensor cores, and spills registers for it.
    half = precision in ("fp16", "bf16")
    if number == 0 and half and triton_block.supports(shape.filters, shape.batch, shape.edge):
        found["triton block"] = triton_block.first_block
    return found


def choose_kernels(
    model: nn.Module, kind: Kernels, precision: Precision, batch: int, device: torch.device
) -> list[str]:
    """Return the name of the candidate for each block of `model`; empty where there is no choice.

    There is none where `block_shapes` has none, and on a CPU.

    Args:
        model: The network.
        kind: "torch", or "triton" for Triton's most fused candidate of each block, both without a check;
            "auto" checks and times all candidates and logs the result.
        precision: Of the training step.
        batch: Samples that are processed at a time.
        device: On which the network runs.

    Raises:
        ConfigError: `kind` is "triton", and a block has no candidate of Triton.
        UserError: No candidate of a block agrees with float64.
    """
    shapes = block_shapes(model, batch) if device.type == "cuda" else []
    found = [candidates(number, shape, precision) for number, shape in enumerate(shapes)]
    if kind == "triton" and (not found or any(len(names) == 1 for names in found)):
        reason = "needs Triton, the reference network of 8 filters or more, and a GPU; use auto"
        raise ConfigError("compute.kernels", kind, reason)
    if kind != "auto":
        return [list(names)[0 if kind == "torch" else -1] for names in found]
    count = sum(map(len, found))
    return [
        choose(f"block {number + 1}", names, shape, precision, device, _SECONDS / count)
        for number, (names, shape) in enumerate(zip(found, shapes, strict=True))
    ]


def use_kernels(model: nn.Module, names: Sequence[str], precision: Precision, batch: int) -> None:
    """Compute the blocks of `model` with the candidates `names`; see `choose_kernels`.

    Raises:
        ConfigError: A candidate is missing, for example because Triton is not installed.
    """
    for number, (name, shape) in enumerate(zip(names, block_shapes(model, batch), strict=bool(names))):
        found = candidates(number, shape, precision)
        if name not in found:
            reason = f"the run computes block {number + 1} with it, and it is not available: install Triton"
            raise ConfigError("compute.kernels", name, reason)
        assert isinstance(model, CosmoFlow)
        model.blocks[number] = found[name]


def choose(
    title: str,
    blocks: Mapping[str, Block],
    shape: Shape,
    precision: Precision,
    device: torch.device,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """Return the name of the fastest of `blocks` that agrees with float64, and log it with all times.

    Args:
        title: Name of the block for the log.
        blocks: Candidates by name.
        shape: Of the block.
        precision: Of the training step.
        device: On which the block runs.
        seconds: Time limit of a candidate's timed steps.
        clock: Returns the time in seconds; a GPU's own is used instead.

    Raises:
        UserError: No candidate agrees.
    """
    faults = find_faults(blocks, shape, precision, device)
    times: dict[str, float] = {}
    words: list[str] = []
    for name, block in blocks.items():
        if not faults[name]:
            try:
                times[name] = _time_steps(block, shape, precision, device, seconds, clock)
                words.append(f"{name} {1e3 * times[name]:.3f} ms")
            except Exception as error:  # compilers raise many types
                faults[name] = _first_line(error)
        if faults[name]:
            words.append(f"{name} left out: {faults[name]}")
    if not times:
        raise UserError(
            f"{title}: no kernel works at {precision} with torch {torch.__version__} and cuDNN "
            f"{torch.backends.cudnn.version()} ({'; '.join(words)}); use a smaller batch, another precision "
            "or version"
        )
    best = min(times, key=times.__getitem__)
    logger.info("%s: %s (%s)", title, best, ", ".join(words))
    return best


def find_faults(
    blocks: Mapping[str, Block], shape: Shape, precision: Precision, device: torch.device
) -> dict[str, str]:
    """Return why each of `blocks` does not agree with float64 at one sample of `shape`; "" if it does."""
    checked = shape._replace(batch=1, edge=min(shape.edge, _CHECKED_EDGE))
    inputs, gradient = _problem(checked, precision, device)
    wide = [value.detach().double().requires_grad_(value.requires_grad) for value in inputs]
    expected = _solve(pool_then_activate, wide, gradient, "fp32")
    faults = {}
    for name, block in blocks.items():
        try:
            found = _solve(block, inputs, gradient, precision)
            faults[name] = _disagreement(found, expected, _ROUNDING[precision]) or ""
        except Exception as error:  # compilers raise many types
            faults[name] = _first_line(error)
    return faults


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _problem(
    shape: Shape, precision: Precision, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return volume, kernel and bias, and the result's gradient, of a block of `shape` in a training step.

    They are small integers, and few numbers of the kernel are not zero: so all sums are exact in half
    precision, and candidates agree on each cell's maximum, where random numbers would tie after rounding.
    """
    generator = torch.Generator(device).manual_seed(1)
    half = input_dtype(precision)

    def draw(low: int, high: int, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator, device=device, dtype=dtype)

    batch, channels, filters, edge = shape
    taps = 27 * channels
    volume = draw(0, 3, batch, edge, edge, edge, channels, dtype=half).permute(0, 4, 1, 2, 3)
    rare = torch.rand(filters, taps, generator=generator, device=device) < 24 / taps
    kernel = ((2 * draw(0, 2, filters, taps) - 1) * rare).view(filters, channels, 3, 3, 3)
    gradient = draw(-1, 2, batch, edge // 2, edge // 2, edge // 2, filters, dtype=half)
    # The first block's input is data.
    volume.requires_grad_(channels != len(REDSHIFTS))
    inputs = [volume, kernel.requires_grad_(), draw(-2, 3, filters).requires_grad_()]
    return inputs, gradient.permute(0, 4, 1, 2, 3)


def _solve(
    block: Block, inputs: list[torch.Tensor], gradient: torch.Tensor, precision: Precision
) -> list[torch.Tensor]:
    """Return the result of `block` for `inputs`, and the gradients of those that have one."""
    with autocast(precision, gradient.device):
        result = block(*inputs)
    leaves = [value for value in inputs if value.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, leaves, gradient.to(result.dtype))]


def _disagreement(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> str | None:
    """Return the reason why `found` differs from `expected` by more than `tolerance`, or None."""
    parts = ["result", "gradient of the volume", "gradient of the kernel", "gradient of the bias"]
    if len(found) == 3:
        del parts[1]
    for part, one, other in zip(parts, found, expected, strict=True):
        error, norm = (one.double() - other).norm().item(), other.norm().item()
        # A comparison that NaN fails.
        if not error <= tolerance * norm:
            return f"its {part} is off by {error:.2g}, more than {tolerance:.2g} of its norm {norm:.2g}"
    return None


def _time_steps(
    block: Block,
    shape: Shape,
    precision: Precision,
    device: torch.device,
    seconds: float,
    clock: Callable[[], float],
) -> float:
    """Return the mean seconds of a forward and backward pass, of as many as fit in `seconds`."""
    inputs, gradient = _problem(shape, precision, device)

    def run(steps: int) -> None:
        for _ in range(steps):
            _solve(block, inputs, gradient, precision)

    def take(steps: int) -> float:
        if device.type != "cuda":
            start = clock()
            run(steps)
            return clock() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Meanwhile Python launches the steps.
        torch.cuda._sleep(_LEAD_CYCLES)
        first.record()
        run(steps)
        last.record()
        last.synchronize()
        return 1e-3 * first.elapsed_time(last)

    # The first step includes cuDNN's own search.
    take(1)
    steps = int(min(_TIMED_STEPS, max(1, seconds / take(1))))
    return take(steps) / steps
