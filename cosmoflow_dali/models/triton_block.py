"""The first block in one Triton kernel: a 3^3 convolution of 4 channels, bias, LeakyReLU and max pooling.

At 128^3 the full-size activation has 134 MB per sample in half precision; separate kernels write it once and
read it three times, although the result is an eighth of it. Here a program convolves the voxels of each of
its cells and keeps the largest value and, in a byte, its voxel. The backward pass reads this byte and the
input again; the input is data and needs no gradient.

The four voxels of a cell in one D-slice read a window of 3 x 4 x 4 voxels. A row of its H-W plane is 16
contiguous numbers, so a plane is loaded without index arithmetic, and serves as a factor of 64 columns of
which each voxel's weights leave a quarter or more zero.

Runs on a GPU and, with TRITON_INTERPRET=1, on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cosmoflow_dali.models.blocks import LEAK, cast
from pipelines.sample import REDSHIFTS

CHANNELS = len(REDSHIFTS)
_WINDOW = 4 * 4 * CHANNELS
"""Numbers in an H-W plane of the window of a cell."""

_SUMS = 4096
"""Limit of cells times filters of a program of the forward pass, by its registers."""

_CELLS = 32
"""Cells that a program of the backward pass processes at a time, by its registers."""

_PROGRAMS = 128
"""Programs of the backward pass; their sums are added in a fixed order, so results are reproducible."""

_LAUNCH = {"num_warps": 8, "num_stages": 1}
"""Without stages of prefetched loads, which would take most of the shared memory."""


def supports(filters: int, batch: int, edge: int) -> bool:
    """Return True if `first_block` supports `batch` volumes of `edge` voxels, in half precision.

    tl.dot needs 16 filters, registers limit them to 64, and offsets have 32 bits.
    """
    return filters in (16, 32, 64) and batch * (edge + 2) ** 3 * CHANNELS < 1 << 31


def first_block(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Apply `blocks.plain_max_block` in one kernel.

    Products have the dtype of `volume`, or autocast's; sums are float32. Of equal voxels in a cell the first
    in (D, H, W) order is the maximum, as in torch.

    Args:
        volume: (B, 4, D, H, W), channels-last, without gradient; see `supports`.
        kernel: (C, 4, 3, 3, 3).
        bias: (C,).

    Returns:
        (B, C, D/2, H/2, W/2) in the dtype of the products, channels-last.
    """
    pooled: torch.Tensor = _FirstBlock.apply(*cast(volume, kernel, bias))
    return pooled


class _FirstBlock(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        # With a border of zeros no load needs a mask.
        rows = functional.pad(volume.permute(0, 2, 3, 4, 1), (0, 0, 1, 1, 1, 1, 1, 1))
        batch, *padded, _ = rows.shape
        half = [edge // 2 - 1 for edge in padded]
        filters = len(kernel)
        pooled = rows.new_empty(batch, *half, filters)
        chosen = torch.empty(pooled.shape, dtype=torch.uint8, device=rows.device)
        weights = functional.pad(kernel.reshape(-1), (0, 1))[_taps_of_weights(filters, rows.device)]
        cells, each = pooled.numel() // filters, min(128, _SUMS // filters)
        _forward[(triton.cdiv(cells, each),)](
            rows, weights, bias, pooled, chosen, cells, LEAK, *half,
            FILTERS=filters, CELLS=each, CHANNELS=CHANNELS, **_LAUNCH,
        )  # fmt: skip
        context.save_for_backward(rows, pooled, chosen)
        context.dtype = kernel.dtype
        return pooled.permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        rows, pooled, chosen = context.saved_tensors
        *_, depth, height, width, filters = pooled.shape
        cells = pooled.numel() // filters
        grad_output = gradient.permute(0, 2, 3, 4, 1).contiguous()
        programs = min(_PROGRAMS, triton.cdiv(cells, _CELLS))
        grad_weights = torch.empty(programs, 2, 3, _WINDOW, filters, 2, device=rows.device)
        grad_bias = torch.empty(programs, filters, device=rows.device)
        _backward[(programs, 2)](
            rows, grad_output, pooled, chosen, grad_weights, grad_bias, cells, LEAK, depth, height, width,
            PROGRAMS=programs, FILTERS=filters, CELLS=_CELLS, CHANNELS=CHANNELS, **_LAUNCH,
        )  # fmt: skip
        summed = grad_weights.sum(0).view(-1)[_weights_of_taps(filters, rows.device)].sum(-1)
        return None, summed.to(context.dtype), grad_bias.sum(0).to(context.dtype)


@functools.cache
def _taps_of_weights(filters: int, device: torch.device) -> torch.Tensor:
    """Return, for each weight that the kernels read, its position in the flat convolution kernel.

    Returns:
        int64 of shape (voxel along H, tap along D, row of the window, filter, voxel along W). The position
        of a weight that is zero is one behind the last.
    """
    size = filters * CHANNELS * 27
    taps = torch.arange(size).view(filters, CHANNELS, 3, 3, 3).permute(2, 3, 4, 1, 0)
    positions = torch.full((2, 3, 4, 4, CHANNELS, filters, 2), size)
    for h in range(2):
        for w in range(2):
            positions[h, :, h : h + 3, w : w + 3, :, :, w] = taps
    return positions.view(2, 3, _WINDOW, filters, 2).to(device)


@functools.cache
def _weights_of_taps(filters: int, device: torch.device) -> torch.Tensor:
    """Return the positions of the four weights of each tap, (C, 4, 3, 3, 3, 4); see `_taps_of_weights`."""
    positions = _taps_of_weights(filters, torch.device("cpu")).view(-1)
    order = positions.argsort(stable=True)[: 4 * 27 * CHANNELS * filters]
    return order.view(filters, CHANNELS, 3, 3, 3, 4).to(device)


@triton.jit
def _window_offsets(
    cell, DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Return the offsets of the first plane of each `cell`'s window: (CELLS, 64)."""
    w, line = cell % WIDTH, cell // WIDTH
    h, slab = line % HEIGHT, line // HEIGHT
    d, sample = slab % DEPTH, slab // DEPTH
    row: tl.constexpr = (2 * WIDTH + 2) * CHANNELS
    first = ((sample * (2 * DEPTH + 2) + 2 * d) * (2 * HEIGHT + 2) + 2 * h) * row + 2 * w * CHANNELS
    number = tl.arange(0, 16 * CHANNELS)
    return first[:, None] + (number // (4 * CHANNELS) * row + number % (4 * CHANNELS))[None, :]


@triton.jit
def _forward(
    rows, weights, bias, pooled, chosen, cells, leak,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    FILTERS: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = 16 * CHANNELS
    COLUMNS: tl.constexpr = 2 * FILTERS
    # Beyond the last cell it is computed, and stored, again.
    cell = tl.minimum(tl.program_id(0) * CELLS + tl.arange(0, CELLS), cells - 1)
    at = _window_offsets(cell, DEPTH, HEIGHT, WIDTH, CHANNELS)
    plane: tl.constexpr = (2 * HEIGHT + 2) * (2 * WIDTH + 2) * CHANNELS
    weight = tl.arange(0, WINDOW)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    largest = tl.full((CELLS, FILTERS), float("-inf"), tl.float32)
    which = tl.zeros((CELLS, FILTERS), tl.int32)
    for pair in range(4):
        d, h = pair // 2, pair % 2
        sums = tl.zeros((CELLS, COLUMNS), tl.float32)
        for tap in tl.static_range(3):
            window = tl.load(rows + at + (d + tap) * plane)
            factors = tl.load(weights + weight + (h * 3 + tap) * WINDOW * COLUMNS)
            sums = tl.dot(window, factors, sums, input_precision="ieee")
        left, right = tl.split(tl.reshape(sums, (CELLS, FILTERS, 2)))
        # NaN wins, so it is not hidden.
        wins = (left > largest) | (left != left)
        largest = tl.where(wins, left, largest)
        which = tl.where(wins, 2 * pair, which)
        wins = (right > largest) | (right != right)
        largest = tl.where(wins, right, largest)
        which = tl.where(wins, 2 * pair + 1, which)
    filters = tl.arange(0, FILTERS)
    largest += tl.load(bias + filters).to(tl.float32)[None, :]
    # LeakyReLU preserves the order, so it can follow the pooling.
    largest = tl.where(largest > 0, largest, largest * leak)
    out = cell[:, None] * FILTERS + filters[None, :]
    tl.store(pooled + out, largest.to(pooled.dtype.element_ty))
    tl.store(chosen + out, which.to(tl.uint8))


@triton.jit
def _backward(
    rows, grad_output, pooled, chosen, grad_weights, grad_bias, cells, leak,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr, FILTERS: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = 16 * CHANNELS
    COLUMNS: tl.constexpr = 2 * FILTERS
    program, h = tl.program_id(0), tl.program_id(1)
    filters = tl.arange(0, FILTERS)
    plane: tl.constexpr = (2 * HEIGHT + 2) * (2 * WIDTH + 2) * CHANNELS
    below = tl.zeros((WINDOW, COLUMNS), tl.float32)
    middle = tl.zeros((WINDOW, COLUMNS), tl.float32)
    above = tl.zeros((WINDOW, COLUMNS), tl.float32)
    bias_sums = tl.zeros((FILTERS,), tl.float32)
    for first in range(program * CELLS, cells, PROGRAMS * CELLS):
        number = first + tl.arange(0, CELLS)
        cell = tl.minimum(number, cells - 1)
        at = _window_offsets(cell, DEPTH, HEIGHT, WIDTH, CHANNELS)
        out = cell[:, None] * FILTERS + filters[None, :]
        which = tl.load(chosen + out).to(tl.int32)
        grad = tl.load(grad_output + out).to(tl.float32)
        grad = tl.where(tl.load(pooled + out).to(tl.float32) > 0, grad, grad * leak)
        grad = tl.where((number < cells)[:, None], grad, 0.0)
        bias_sums += tl.sum(grad, 0)
        for d in range(2):
            left = tl.where(which == 4 * d + 2 * h, grad, 0.0)
            right = tl.where(which == 4 * d + 2 * h + 1, grad, 0.0)
            part = tl.reshape(tl.join(left, right), (CELLS, COLUMNS)).to(rows.dtype.element_ty)
            window = rows + at + d * plane
            below = tl.dot(tl.trans(tl.load(window)), part, below, input_precision="ieee")
            middle = tl.dot(tl.trans(tl.load(window + plane)), part, middle, input_precision="ieee")
            above = tl.dot(tl.trans(tl.load(window + 2 * plane)), part, above, input_precision="ieee")
    at = tl.arange(0, WINDOW)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at += (program * 2 + h) * 3 * WINDOW * COLUMNS
    tl.store(grad_weights + at, below)
    tl.store(grad_weights + at + WINDOW * COLUMNS, middle)
    tl.store(grad_weights + at + 2 * WINDOW * COLUMNS, above)
    if h == 0:
        tl.store(grad_bias + program * FILTERS + filters, bias_sums)
