"""Convolution blocks of the networks, each a single autograd step where that is faster.

A block is a 3^3 convolution, activation (with or without normalisation), and 2^3 pooling. The plain forms
consist of torch's operations and serve as reference. On a CPU an operation costs the memory that it reads and
writes; the fused forms read and write less: they pool before activation where that is equivalent, keep only
the convolution's output, and compute its gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cosmoflow_dali.models.cpu_conv import Padding, conv3d, conv3d_backward

LEAK = 0.3
"""Slope of LeakyReLU below 0 in both networks."""

TIE = 1e-5
"""Distance from its cell's maximum within which a voxel counts as a maximum, as in TensorFlow."""


def max_block(
    volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor, *, halos: bool = False
) -> torch.Tensor:
    """Apply zero-padded convolution, LeakyReLU and max pooling: (B, c, D, H, W) to (B, C, D/2, H/2, W/2).

    All three edges must be even. On a CPU the gradient is that of TensorFlow's CPU kernel
    (tensorflow/core/kernels/pooling_ops_3d.cc), which passes it to every voxel within `TIE` of its cell's
    maximum; torch and cuDNN choose one voxel. Near-ties are common in volumes that are half empty, and the
    two rules differ by percents. Each voxel uses the slope of LeakyReLU at the maximum.

    Args:
        volume: (B, c, D, H, W).
        kernel: (C, c, 3, 3, 3).
        bias: (C,).
        halos: `volume` has one plane more on either side along D, instead of zeros.
    """
    if volume.device.type == "cpu":
        arguments = cast(volume, kernel, bias)
        with torch.autocast("cpu", enabled=False):
            pooled: torch.Tensor = _MaxBlock.apply(*arguments, _zeros(halos))
        return pooled
    return pool_then_activate(volume, kernel, bias, halos=halos)


def pool_then_activate(
    volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor, *, halos: bool = False
) -> torch.Tensor:
    """Apply `max_block` by torch's operations, with bias and activation after pooling.

    Bias, activation and the rounding in between preserve the order of values, so the result equals
    `plain_max_block` bit for bit where torch adds the bias after the convolution, as on GPUs.
    """
    largest = functional.max_pool3d(functional.conv3d(volume, kernel, padding=_zeros(halos)), 2)
    return functional.leaky_relu(largest + bias.to(largest.dtype)[:, None, None, None], LEAK)


def plain_max_block(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Apply `max_block` by torch's operations in their defined order; the gradient goes to one maximum."""
    return functional.max_pool3d(
        functional.leaky_relu(functional.conv3d(volume, kernel, bias, padding=1), LEAK), 2
    )


class _MaxBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor, padding: Padding
    ) -> torch.Tensor:
        values = to_rows(conv3d(volume, kernel, bias, padding=padding))
        # LeakyReLU preserves the order of values, so it can follow the pooling.
        largest = functional.max_pool3d(values.permute(0, 4, 1, 2, 3), 2)
        context.save_for_backward(volume, kernel, values, largest)
        context.padding = padding
        return functional.leaky_relu(largest, LEAK)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        volume, kernel, values, largest = context.saved_tensors
        # The smallest value within TIE of the maximum after activation. Half precision may round TIE away,
        # and the maximum itself must remain.
        exact = largest.to(torch.promote_types(largest.dtype, torch.float32))
        smallest = functional.leaky_relu(exact, LEAK) - TIE
        smallest = torch.where(smallest > 0, smallest, smallest / LEAK).to(largest.dtype).minimum(largest)
        share = torch.where(largest > 0, gradient, LEAK * gradient)
        # In place: `values` becomes its own gradient.
        cells_of(values).ge_(spread_along(smallest)).mul_(spread_along(share))
        grad_values, mask = values.permute(0, 4, 1, 2, 3), list(context.needs_input_grad[:3])
        gradients = conv3d_backward(grad_values, volume, kernel, padding=context.padding, output_mask=mask)
        return *gradients, None


def _zeros(halos: bool) -> Padding:
    """Return the padding of a zero-padded convolution whose input may have halos along D."""
    return (0, 1, 1) if halos else (1, 1, 1)


def norm_block(
    volume: torch.Tensor,
    kernel: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    *,
    halos: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply periodic convolution, batch normalisation, LeakyReLU and average pooling on a CPU.

    Args:
        volume: (B, c, D, H, W) with even edges; all ranks have equal batches.
        kernel: (C, c, 3, 3, 3).
        scale, shift: (C,) each, of the normalisation.
        eps: Added to the variance.
        halos: `volume` has one plane more on either side along D, which is then not taken as periodic.

    Returns:
        (B, C, D/2, H/2, W/2), and the mean and biased variance over the global batch, (C,) each.
    """
    arguments = cast(volume, kernel)
    with torch.autocast("cpu", enabled=False):
        pooled, mean, variance = _NormBlock.apply(*arguments, scale, shift, eps, halos)
    return pooled, mean, variance


class _NormBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        volume: torch.Tensor,
        kernel: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        eps: float,
        halos: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        context.halos = halos
        volume = wrapped(volume, halos=halos)
        values = to_rows(conv3d(volume, kernel, None, padding=(0, 0, 0))).to(scale.dtype)
        *_, edge, channels = values.shape
        wide = values.view(-1, edge * channels)

        def along(one: torch.Tensor) -> torch.Tensor:
            return one.repeat(edge)

        mean = mean_over_ranks(channel_mean(wide, channels))
        wide.sub_(along(mean))
        variance = mean_over_ranks(channel_mean(wide.square(), channels))
        inverse = torch.rsqrt(variance + eps)
        wide.mul_(along(inverse))
        active = torch.addcmul(along(shift), wide, along(scale))
        functional.leaky_relu_(active, LEAK)
        context.save_for_backward(volume, kernel, scale, inverse, values, active)
        context.mark_non_differentiable(mean, variance)
        return average_cells(active.view(values.shape)), mean, variance

    @staticmethod
    @once_differentiable
    def backward(
        context: Any, gradient: torch.Tensor, *grad_statistics: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        volume, kernel, scale, inverse, values, active = context.saved_tensors
        *_, edge, channels = values.shape
        cells = cells_of(active.view(values.shape))
        spread = spread_along(gradient / 8).expand_as(cells)
        # LeakyReLU preserves the sign, so its output determines its slope.
        back = torch.ops.aten.leaky_relu_backward(spread, cells, LEAK, False)
        back, wide = back.view(-1, edge * channels), values.view(-1, edge * channels)
        grad_shift = channel_mean(back, channels)
        grad_scale = channel_mean(torch.mul(back, wide, out=active), channels)
        # d/dx of normalised values: scale / sigma (g - mean(g) - x mean(g x)), with means over the batch.
        slope = (scale * inverse).repeat(edge)
        wide.mul_(-mean_over_ranks(grad_scale.clone()).repeat(edge))
        wide.add_(back).sub_(mean_over_ranks(grad_shift.clone()).repeat(edge)).mul_(slope)
        count = values.numel() // channels
        mask = [*context.needs_input_grad[:2], False]
        grad_values = values.permute(0, 4, 1, 2, 3).to(volume.dtype)
        grad_wrapped, grad_weight, _ = conv3d_backward(
            grad_values, volume, kernel, padding=(0, 0, 0), output_mask=mask
        )
        if grad_wrapped is not None and context.halos:
            fold_padding(grad_wrapped, 3, 4)
            grad_wrapped = grad_wrapped[..., 1:-1, 1:-1]
        elif grad_wrapped is not None:
            fold_padding(grad_wrapped, 2, 3, 4)
            grad_wrapped = grad_wrapped[:, :, 1:-1, 1:-1, 1:-1]
        return grad_wrapped, grad_weight, grad_scale * count, grad_shift * count, None, None


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Average `value` over ranks in place and return it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def cast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Convert `tensors` to the dtype of autocast on their device, if it is enabled."""
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


def wrapped(
    volume: torch.Tensor, first: int = 0, last: int | None = None, *, halos: bool = False
) -> torch.Tensor:
    """Return planes `first` to `last` along D of `volume` (B, C, D, H, W), and one voxel more on every side.

    All three axes are periodic. By default these are all planes. With `halos`, `volume` has one plane more on
    either side along D, and the planes are counted from the second.
    """
    batch, channels, depth, height, width = volume.shape
    last = (depth - 2 if halos else depth) if last is None else last
    rows = volume.new_empty(batch, last - first + 2, height + 2, width + 2, channels)
    inside, planes = rows[:, :, 1:-1, 1:-1], volume.permute(0, 2, 3, 4, 1)
    if halos:
        inside.copy_(planes[:, first : last + 2])
    else:
        inside[:, 1:-1] = planes[:, first:last]
        inside[:, 0] = planes[:, first - 1]
        inside[:, -1] = planes[:, last % depth]
    for axis in (3, 2):
        rows.select(axis, 0).copy_(rows.select(axis, -2))
        rows.select(axis, -1).copy_(rows.select(axis, 1))
    return rows.permute(0, 4, 1, 2, 3)


def fold_padding(gradient: torch.Tensor, *axes: int) -> None:
    """Add, in place, the gradients of circular padding along `axes` to the voxels that it repeats."""
    for axis in axes:
        gradient.select(axis, -2).add_(gradient.select(axis, 0))
        gradient.select(axis, 1).add_(gradient.select(axis, -1))


def to_rows(volume: torch.Tensor) -> torch.Tensor:
    """Return (B, C, D, H, W) as contiguous (B, D, H, W, C), the order of channels-last memory."""
    return volume.permute(0, 2, 3, 4, 1).contiguous()


def cells_of(values: torch.Tensor) -> torch.Tensor:
    """View (B, D, H, W, C) as cells along D and H of lines along W: (B D/2, 2, H/2, 2, W C).

    Operations on these long lines are vectorised for any C.
    """
    batch, depth, height, width, channels = values.shape
    return values.view(batch * depth // 2, 2, height // 2, 2, width * channels)


def spread_along(pooled: torch.Tensor) -> torch.Tensor:
    """Repeat (B, C, D/2, H/2, W/2) along W to broadcast with `cells_of`: (B D/2, 1, H/2, 1, W C)."""
    rows = to_rows(pooled)
    batch, depth, height, width, channels = rows.shape
    twice = rows.unsqueeze(4).expand(-1, -1, -1, -1, 2, -1)
    return twice.reshape(batch * depth, 1, height, 1, 2 * width * channels)


def average_cells(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of each cell of 2^3 voxels of (B, D, H, W, C): (B, C, D/2, H/2, W/2)."""
    batch, depth, height, width, channels = values.shape
    cells = cells_of(values)
    total = cells[:, 0, :, 0] + cells[:, 0, :, 1]
    total += cells[:, 1, :, 0]
    total += cells[:, 1, :, 1]
    pairs = total.view(-1, width // 2, 2, channels)
    mean = (pairs[:, :, 0] + pairs[:, :, 1]).mul_(0.125)
    return mean.view(batch, depth // 2, height // 2, width // 2, channels).permute(0, 4, 1, 2, 3)


def channel_mean(wide: torch.Tensor, channels: int) -> torch.Tensor:
    """Return the mean (C,) of each channel over (lines, W C)."""
    return wide.mean(0).view(-1, channels).mean(0)
