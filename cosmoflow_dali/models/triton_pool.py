"""Max pooling with bias and LeakyReLU in one Triton kernel, for the output of a convolution without bias.

Torch's own pooling writes eight bytes an index and its backward pass fills the gradient with zeros and then
adds to it atomically. Here the index is a byte, and the backward pass writes each element once.

Runs on a GPU and, with TRITON_INTERPRET=1, on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cosmoflow_dali.models.blocks import LEAK, cast

_ELEMENTS = 1024
"""Elements of the pooled volume that a program processes at a time."""

_PROGRAMS = 1024
"""Programs of the backward pass; their sums are added in a fixed order, so results are reproducible."""


def supports(filters: int, batch: int, edge: int) -> bool:
    """Return True if `pool_block` supports `batch` volumes of `edge` voxels with this number of filters.

    Numbers of elements have 32 bits, also in the round after the backward pass's last.
    """
    elements = batch * (edge // 2) ** 3 * filters
    return filters in (8, 16, 32, 64, 128, 256, 512, 1024) and elements <= (1 << 31) - _PROGRAMS * _ELEMENTS


def pool_block(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Apply `blocks.max_block`: torch's convolution, then `pool`."""
    volume, kernel, bias = cast(volume, kernel, bias)
    return pool(functional.conv3d(volume, kernel, padding=1), bias)


def pool(values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Apply 2^3 max pooling, bias and LeakyReLU, bit for bit as `blocks.pool_then_activate` does.

    Of equal voxels in a cell the first in (D, H, W) order is the maximum, as in torch; NaN is larger than
    any number.

    Args:
        values: (B, C, D, H, W) with even edges, channels-last; see `supports` for C.
        bias: (C,) of the dtype of `values`.

    Returns:
        (B, C, D/2, H/2, W/2), channels-last.
    """
    pooled: torch.Tensor = _Pool.apply(values, bias)
    return pooled


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = values.permute(0, 2, 3, 4, 1).contiguous()
        batch, depth, height, width, channels = rows.shape
        shape = batch, depth // 2, height // 2, width // 2, channels
        pooled = rows.new_empty(shape)
        chosen = torch.empty(shape, dtype=torch.uint8, device=rows.device)
        count = pooled.numel()
        _forward[(triton.cdiv(count, _ELEMENTS),)](
            rows, bias, pooled, chosen, count, height, width, LEAK, CHANNELS=channels, ELEMENTS=_ELEMENTS
        )
        context.save_for_backward(pooled, chosen)
        return pooled.permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, chosen = context.saved_tensors
        grad_output = gradient.permute(0, 2, 3, 4, 1).contiguous()
        batch, depth, height, width, channels = pooled.shape
        grad_rows = pooled.new_empty(batch, 2 * depth, 2 * height, 2 * width, channels)
        count = pooled.numel()
        programs = min(_PROGRAMS, triton.cdiv(count, _ELEMENTS))
        grad_bias = torch.empty(programs, channels, device=pooled.device)
        _backward[(programs,)](
            grad_output, pooled, chosen, grad_rows, grad_bias, count, 2 * height, 2 * width, LEAK,
            PROGRAMS=programs, CHANNELS=channels, ELEMENTS=_ELEMENTS,
        )  # fmt: skip
        return grad_rows.permute(0, 4, 1, 2, 3), grad_bias.sum(0).to(gradient.dtype)


@triton.jit
def _first_voxels(element, height, width, CHANNELS: tl.constexpr):
    """Return the position of the first voxel of each `element`'s cell in a volume of `height` and `width`."""
    cell, channel = element // CHANNELS, element % CHANNELS
    w, line = cell % (width // 2), cell // (width // 2)
    h, plane = line % (height // 2), line // (height // 2)
    # Planes of all samples follow each other, so the sample needs no index of its own.
    return ((plane.to(tl.int64) * 2 * height + 2 * h) * width + 2 * w) * CHANNELS + channel


@triton.jit
def _forward(
    rows, bias, pooled, chosen, count, height, width, leak, CHANNELS: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < count
    first = _first_voxels(element, height, width, CHANNELS)
    largest = tl.load(rows + first, mask=inside, other=0.0).to(tl.float32)
    which = tl.zeros((ELEMENTS,), tl.int32)
    for voxel in tl.static_range(1, 8):
        offset = ((voxel // 4 * height + voxel // 2 % 2) * width + voxel % 2) * CHANNELS
        value = tl.load(rows + first + offset, mask=inside, other=0.0).to(tl.float32)
        # NaN wins, so it is not hidden.
        wins = (value > largest) | (value != value)
        largest = tl.where(wins, value, largest)
        which = tl.where(wins, voxel, which)
    dtype = pooled.dtype.element_ty
    # Rounded after each operation, as torch's separate kernels round. Both preserve the order of values.
    shifted = (largest + tl.load(bias + element % CHANNELS).to(tl.float32)).to(dtype).to(tl.float32)
    active = tl.where(shifted > 0, shifted, shifted * leak).to(dtype)
    tl.store(pooled + element, active, mask=inside)
    tl.store(chosen + element, which.to(tl.uint8), mask=inside)


@triton.jit
def _backward(
    grad_output, pooled, chosen, grad_rows, grad_bias, count, height, width, leak,
    PROGRAMS: tl.constexpr, CHANNELS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sums = tl.zeros((ELEMENTS // CHANNELS, CHANNELS), tl.float32)
    zero = tl.zeros((ELEMENTS,), tl.float32).to(grad_rows.dtype.element_ty)
    for start in range(program * ELEMENTS, count, PROGRAMS * ELEMENTS):
        element = start + tl.arange(0, ELEMENTS)
        inside = element < count
        out = tl.load(pooled + element, mask=inside, other=0.0).to(tl.float32)
        which = tl.load(chosen + element, mask=inside, other=0)
        grad = tl.load(grad_output + element, mask=inside, other=0.0).to(tl.float32)
        share = tl.where(out > 0, grad, grad * leak).to(grad_rows.dtype.element_ty)
        sums += tl.reshape(share.to(tl.float32), (ELEMENTS // CHANNELS, CHANNELS))
        first = _first_voxels(element, height, width, CHANNELS)
        for voxel in tl.static_range(8):
            offset = ((voxel // 4 * height + voxel // 2 % 2) * width + voxel % 2) * CHANNELS
            tl.store(grad_rows + first + offset, tl.where(which == voxel, share, zero), mask=inside)
    tl.store(grad_bias + program * CHANNELS + tl.arange(0, CHANNELS), tl.sum(sums, 0))
