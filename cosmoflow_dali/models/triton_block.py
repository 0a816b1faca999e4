"""The first block in one Triton kernel: a 3^3 convolution of 4 channels, bias, LeakyReLU and max pooling.

At 128^3 the full-size activation has 134 MB per sample in half precision; separate kernels write it once and
read it three times, although the result is an eighth of it. Here a program convolves the eight voxels of each
of its cells in turn and keeps the largest value and, in a byte, its voxel. The backward pass reads this byte
and the input again; the input is data and needs no gradient.

Runs on a GPU and, with TRITON_INTERPRET=1, on a CPU.
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
"""27 taps of 4 channels, padded with zeros to a power of two as tl.dot requires."""

_CELLS = 64
"""Cells that a program processes at a time."""

FILTERS = 16, 32, 64
"""Supported numbers of filters: tl.dot needs 16 or more, and shared memory limits them to 64."""

_PROGRAMS = 512
"""Programs of the backward pass; their sums are added in a fixed order, so results are reproducible."""


def first_block(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Apply `blocks.plain_max_block` in one kernel.

    Products have the dtype of `volume`, or autocast's; sums are float32. Of equal voxels in a cell the first
    in (D, H, W) order is the maximum, as in torch.

    Args:
        volume: (B, 4, D, H, W), channels-last, without gradient.
        kernel: (C, 4, 3, 3, 3), C in `FILTERS`.
        bias: (C,).

    Returns:
        (B, C, D/2, H/2, W/2) in the dtype of the products, channels-last.
    """
    arguments = cast(volume, kernel, bias)
    with torch.autocast(volume.device.type, enabled=False):
        pooled: torch.Tensor = _FirstBlock.apply(*arguments)
    return pooled


class _FirstBlock(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = volume.permute(0, 2, 3, 4, 1).contiguous()
        batch, depth, height, width, _ = rows.shape
        filters = kernel.shape[0]
        # (taps, C): a tap is (d, h, w, channel), because the input's channels are contiguous.
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
    """Return the precision of float32 products, as `configure_float32` sets it for cuDNN."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


@triton.jit
def _patches(rows, cell, inside, voxel, depth, height, width, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Load (CELLS, TAPS): the input around one `voxel` (0 to 7) of each cell, zero beyond the edges."""
    tap = tl.arange(0, TAPS)
    channel, position = tap % CHANNELS, tap // CHANNELS
    along_w, along_h, along_d = position % 3 - 1, position // 3 % 3 - 1, position // 9 - 1
    w = (cell % (width // 2) * 2 + voxel % 2)[:, None] + along_w[None, :]
    rest = cell // (width // 2)
    h = (rest % (height // 2) * 2 + voxel // 2 % 2)[:, None] + along_h[None, :]
    rest = rest // (height // 2)
    d = (rest % (depth // 2) * 2 + voxel // 4)[:, None] + along_d[None, :]
    sample = (rest // (depth // 2))[:, None].to(tl.int64)
    valid = inside[:, None] & (position < 27)[None, :]
    valid = valid & (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    at = ((sample * depth + d) * height + h) * width + w
    return tl.load(rows + at * CHANNELS + channel[None, :], mask=valid, other=0.0)


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
    largest = tl.full((CELLS, FILTERS), float("-inf"), tl.float32)
    which = tl.zeros((CELLS, FILTERS), tl.int32)
    for voxel in range(8):
        patch = _patches(rows, cell, inside, voxel, depth, height, width, TAPS, CHANNELS)
        value = tl.dot(patch, weights, input_precision=FLOAT32)
        # NaN wins, so it is not hidden.
        wins = (value > largest) | (value != value)
        largest = tl.where(wins, value, largest)
        which = tl.where(wins, voxel, which)
    largest += tl.load(bias + filters)[None, :]
    # LeakyReLU preserves the order, so it can follow the pooling.
    largest = tl.where(largest > 0, largest, largest * leak)
    at = cell[:, None].to(tl.int64) * FILTERS + filters[None, :]
    tl.store(pooled + at, largest.to(pooled.dtype.element_ty), mask=inside[:, None])
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
    bias_sums = tl.zeros((FILTERS,), tl.float32)
    for first in range(program * CELLS, cells, PROGRAMS * CELLS):
        cell = first + tl.arange(0, CELLS)
        inside = cell < cells
        at = cell[:, None].to(tl.int64) * FILTERS + filters[None, :]
        out = tl.load(pooled + at, mask=inside[:, None], other=0.0)
        which = tl.load(chosen + at, mask=inside[:, None], other=0)
        grad = tl.load(grad_output + at, mask=inside[:, None], other=0.0)
        grad = tl.where(out > 0, grad.to(tl.float32), grad.to(tl.float32) * leak)
        bias_sums += tl.sum(grad, 0)
        for voxel in range(8):
            patch = _patches(rows, cell, inside, voxel, depth, height, width, TAPS, CHANNELS)
            part = tl.where(which == voxel, grad, 0.0).to(patch.dtype)
            sums = tl.dot(tl.trans(patch), part, sums, input_precision=FLOAT32)
    at = (program * TAPS + tl.arange(0, TAPS))[:, None] * FILTERS + filters[None, :]
    tl.store(grad_taps + at, sums)
    tl.store(grad_bias + program * FILTERS + filters, bias_sums)
