"""The first block in one kernel of Triton: a 3^3 convolution of 4 channels, bias, LeakyReLU and max pooling.

At 128^3 the block's full-size activation is 134 MB a sample in half precision, written once and read three
times by separate kernels, and nobody needs it: what comes out is an eighth. Here a program
convolves the eight voxels of some cells one after the other and keeps the largest, and which it was, in
a byte. Backward reads that byte and the input again; the input itself, data, needs no gradient.

Runs on a GPU, and with TRITON_INTERPRET=1 on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from cosmoflow_dali.models.blocks import LEAK, cast
from pipelines.sample import REDSHIFTS

CHANNELS = len(REDSHIFTS)
_TAPS = 128
"""27 taps of 4 channels, and zeros up to a power of two, which a product of Triton's wants."""

_CELLS = 64
"""Cells that a program pools at a time."""

FILTERS = 16, 32, 64
"""How many there may be: a product of Triton's wants 16, and more would outgrow a GPU's shared memory."""

_PROGRAMS = 512
"""Programs of the backward pass, each with sums of its own: added up in one order, so that they repeat."""


def first_block(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`blocks.plain_max_block` of `volume` (B, 4, D, H, W), channels-last and without a gradient of its own.

    kernel: (C, 4, 3, 3, 3), C of `FILTERS`; bias: (C,). Products are of `volume`'s dtype,
    or autocast's, sums of float32; the result is of the products' dtype, channels-last. Of equal voxels
    in a cell the first in (D, H, W) order is the maximum, as torch has it.
    """
    arguments = cast(volume, kernel, bias)
    with torch.autocast(volume.device.type, enabled=False):
        pooled: torch.Tensor = _FirstBlock.apply(*arguments)
    return pooled


def fits(volume: torch.Tensor, kernel: torch.Tensor) -> bool:
    """Whether `first_block` takes these."""
    filters, channels = kernel.shape[:2]
    even = all(edge % 2 == 0 for edge in volume.shape[2:])
    return channels == CHANNELS and filters in FILTERS and even and not volume.requires_grad


class _FirstBlock(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = volume.permute(0, 2, 3, 4, 1).contiguous()
        batch, depth, height, width, _ = rows.shape
        filters = kernel.shape[0]
        # (taps, C): a tap is (d, h, w, channel), as the input's channels lie together.
        taps = rows.new_zeros(_TAPS, filters)
        taps[: 27 * CHANNELS] = kernel.permute(2, 3, 4, 1, 0).reshape(-1, filters)
        shape = batch, depth // 2, height // 2, width // 2, filters
        pooled = rows.new_empty(shape)
        chosen = torch.empty(shape, dtype=torch.uint8, device=rows.device)
        cells = pooled.numel() // filters
        _forward[(triton.cdiv(cells, _CELLS),)](
            rows, taps, bias.float(), pooled, chosen, cells, depth, height, width,
            LEAK, FILTERS=filters, TAPS=_TAPS, CELLS=_CELLS, CHANNELS=CHANNELS, FLOAT32=_float32(),
        )  # fmt: skip
        context.save_for_backward(rows, kernel, pooled, chosen)
        return pooled.permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        rows, kernel, pooled, chosen = context.saved_tensors
        _, depth, height, width, _ = rows.shape
        filters = kernel.shape[0]
        cells = pooled.numel() // filters
        grad_output = gradient.permute(0, 2, 3, 4, 1).contiguous()
        programs = min(_PROGRAMS, triton.cdiv(cells, _CELLS))
        grad_taps = torch.empty(programs, _TAPS, filters, device=rows.device)
        grad_bias = torch.empty(programs, filters, device=rows.device)
        _backward[(programs,)](
            rows, grad_output, pooled, chosen, grad_taps, grad_bias, cells, depth, height, width,
            LEAK, PROGRAMS=programs, FILTERS=filters, TAPS=_TAPS, CELLS=_CELLS, CHANNELS=CHANNELS,
            FLOAT32=_float32(),
        )  # fmt: skip
        summed = grad_taps.sum(0)[: 27 * CHANNELS].view(3, 3, 3, CHANNELS, filters)
        return None, summed.permute(4, 3, 0, 1, 2).to(kernel.dtype), grad_bias.sum(0).to(kernel.dtype)


def _float32() -> str:
    """What float32 is to the matrix units, as `configure_float32` has said for cuDNN's convolutions too."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


@triton.jit
def _patches(rows, cell, inside, voxel, depth, height, width, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """(CELLS, TAPS): what the kernel sees around one `voxel` (0 to 7) of each cell; zeros beyond edges."""
    tap = tl.arange(0, TAPS)
    channel, place = tap % CHANNELS, tap // CHANNELS
    along_w, along_h, along_d = place % 3 - 1, place // 3 % 3 - 1, place // 9 - 1
    w = (cell % (width // 2) * 2 + voxel % 2)[:, None] + along_w[None, :]
    rest = cell // (width // 2)
    h = (rest % (height // 2) * 2 + voxel // 2 % 2)[:, None] + along_h[None, :]
    rest = rest // (height // 2)
    d = (rest % (depth // 2) * 2 + voxel // 4)[:, None] + along_d[None, :]
    sample = (rest // (depth // 2))[:, None].to(tl.int64)
    there = inside[:, None] & (place < 27)[None, :]
    there = there & (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    at = ((sample * depth + d) * height + h) * width + w
    return tl.load(rows + at * CHANNELS + channel[None, :], mask=there, other=0.0)


@triton.jit
def _forward(
    rows, taps, bias, pooled, chosen, cells, depth, height, width, leak,
    FILTERS: tl.constexpr, TAPS: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
    FLOAT32: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    inside = cell < cells
    filters = tl.arange(0, FILTERS)
    weights = tl.load(taps + tl.arange(0, TAPS)[:, None] * FILTERS + filters[None, :])
    most = tl.full((CELLS, FILTERS), float("-inf"), tl.float32)
    which = tl.zeros((CELLS, FILTERS), tl.int32)
    for voxel in range(8):
        seen = _patches(rows, cell, inside, voxel, depth, height, width, TAPS, CHANNELS)
        value = tl.dot(seen, weights, input_precision=FLOAT32)
        # Whatever is no number wins, so that it is noticed.
        wins = (value > most) | (value != value)
        most = tl.where(wins, value, most)
        which = tl.where(wins, voxel, which)
    most += tl.load(bias + filters)[None, :]
    # LeakyReLU keeps the order, so that it can wait until one is left.
    most = tl.where(most > 0, most, most * leak)
    at = cell[:, None].to(tl.int64) * FILTERS + filters[None, :]
    tl.store(pooled + at, most.to(pooled.dtype.element_ty), mask=inside[:, None])
    tl.store(chosen + at, which.to(tl.uint8), mask=inside[:, None])


@triton.jit
def _backward(
    rows, grad_output, pooled, chosen, grad_taps, grad_bias, cells, depth, height, width, leak,
    PROGRAMS: tl.constexpr, FILTERS: tl.constexpr, TAPS: tl.constexpr, CELLS: tl.constexpr,
    CHANNELS: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    filters = tl.arange(0, FILTERS)
    sums = tl.zeros((TAPS, FILTERS), tl.float32)
    shifts = tl.zeros((FILTERS,), tl.float32)
    for first in range(program * CELLS, cells, PROGRAMS * CELLS):
        cell = first + tl.arange(0, CELLS)
        inside = cell < cells
        at = cell[:, None].to(tl.int64) * FILTERS + filters[None, :]
        out = tl.load(pooled + at, mask=inside[:, None], other=0.0)
        which = tl.load(chosen + at, mask=inside[:, None], other=0)
        slope = tl.load(grad_output + at, mask=inside[:, None], other=0.0)
        slope = tl.where(out > 0, slope.to(tl.float32), slope.to(tl.float32) * leak)
        shifts += tl.sum(slope, 0)
        for voxel in range(8):
            seen = _patches(rows, cell, inside, voxel, depth, height, width, TAPS, CHANNELS)
            part = tl.where(which == voxel, slope, 0.0).to(seen.dtype)
            sums = tl.dot(tl.trans(seen), part, sums, input_precision=FLOAT32)
    at = (program * TAPS + tl.arange(0, TAPS))[:, None] * FILTERS + filters[None, :]
    tl.store(grad_taps + at, sums)
    tl.store(grad_bias + program * FILTERS + filters, shifts)
