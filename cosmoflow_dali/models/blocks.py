"""The networks' convolution blocks, each one step of autograd where that is faster.

A block is a 3^3 convolution, what follows it, and pooling over 2^3 voxels. The plain forms are torch's own
operations and the truth. On a CPU, where an operation costs what it reads and writes, the fused
forms do the same with fewer and longer strides: they pool before they activate where that is the
same, keep no more than the convolution's output, and turn that into its gradient where it lies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cosmoflow_dali.models.cpu_conv import conv3d, conv3d_backward

LEAK = 0.3
"""The slope of LeakyReLU below 0 in both networks."""

TIE = 1e-5
"""How near to the maximum of its cell a voxel is a maximum too; TensorFlow's constant."""


def max_block(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Convolution with zeros around, LeakyReLU and max pooling: (B, c, D, H, W) to (B, C, D/2, H/2, W/2).

    All three edges are even. On a CPU the gradient is that of TensorFlow's CPU kernel
    (tensorflow/core/kernels/pooling_ops_3d.cc), which hands it to every voxel within `TIE` of its
    cell's maximum, where torch and cuDNN choose one: near-ties are not rare in volumes that are half
    empty, so the two rules part by percents. Each voxel takes the slope of LeakyReLU at the maximum.
    """
    if volume.device.type == "cpu":
        arguments = cast(volume, kernel, bias)
        with torch.autocast("cpu", enabled=False):
            pooled: torch.Tensor = _MaxBlock.apply(*arguments)
        return pooled
    return pool_then_activate(volume, kernel, bias)


def pool_then_activate(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same of torch's operations: what adds the bias and activates has an eighth of the voxels to do.

    Both keep the order of values, and so does the rounding between them: what comes out is bit for bit that
    of `plain_max_block` where torch adds a convolution's bias behind it, as on GPUs.
    """
    most = functional.max_pool3d(functional.conv3d(volume, kernel, padding=1), 2)
    return functional.leaky_relu(most + bias.to(most.dtype)[:, None, None, None], LEAK)


def plain_max_block(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same as it is written down: the truth, with torch's choice among maxima."""
    return functional.max_pool3d(
        functional.leaky_relu(functional.conv3d(volume, kernel, bias, padding=1), LEAK), 2
    )


class _MaxBlock(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        values = _rows(conv3d(volume, kernel, bias, padding=1))
        # LeakyReLU keeps the order of values, and an eighth of them is left to work on.
        most = functional.max_pool3d(values.permute(0, 4, 1, 2, 3), 2)
        context.save_for_backward(volume, kernel, values, most)
        return functional.leaky_relu(most, LEAK)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        volume, kernel, values, most = context.saved_tensors
        # What is as near to the maximum once both are activated; half precision rounds that away, and
        # the maximum itself must stay.
        least = functional.leaky_relu(most.to(torch.promote_types(most.dtype, torch.float32)), LEAK) - TIE
        least = torch.where(least > 0, least, least / LEAK).to(most.dtype).minimum(most)
        share = torch.where(most > 0, gradient, LEAK * gradient)
        # From here on `values` are the gradient with respect to themselves.
        _wide(values).ge_(_along(least)).mul_(_along(share))
        wanted = list(context.needs_input_grad)
        return conv3d_backward(values.permute(0, 4, 1, 2, 3), volume, kernel, padding=1, wanted=wanted)


def norm_block(
    volume: torch.Tensor, kernel: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolution of a periodic box, batch normalisation, LeakyReLU and average pooling, on a CPU.

    (B, c, D, H, W) to (B, C, D/2, H/2, W/2), all three edges even; and the mean and the variance
    (biased), (C,) each, over the global batch: ranks have equal batches and share their sums.
    """
    arguments = cast(volume, kernel)
    with torch.autocast("cpu", enabled=False):
        pooled, mean, variance = _NormBlock.apply(*arguments, scale, shift, eps)
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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        volume = _wrapped(volume)
        values = _rows(conv3d(volume, kernel, None, padding=0)).to(scale.dtype)
        *_, edge, channels = values.shape
        wide = values.view(-1, edge * channels)

        def along(one: torch.Tensor) -> torch.Tensor:
            return one.repeat(edge)

        mean = mean_over_ranks(_channel_mean(wide, channels))
        wide.sub_(along(mean))
        variance = mean_over_ranks(_channel_mean(wide.square(), channels))
        inverse = torch.rsqrt(variance + eps)
        wide.mul_(along(inverse))
        active = torch.addcmul(along(shift), wide, along(scale))
        functional.leaky_relu_(active, LEAK)
        context.save_for_backward(volume, kernel, scale, inverse, values, active)
        context.mark_non_differentiable(mean, variance)
        return _average(active.view(values.shape)), mean, variance

    @staticmethod
    @once_differentiable
    def backward(
        context: Any, gradient: torch.Tensor, *of_statistics: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        volume, kernel, scale, inverse, values, active = context.saved_tensors
        *_, edge, channels = values.shape
        cells = _wide(active.view(values.shape))
        spread = _along(gradient / 8).expand_as(cells)
        # LeakyReLU keeps the sign, so that what came out of it tells its slope.
        back = torch.ops.aten.leaky_relu_backward(spread, cells, LEAK, False)
        back, wide = back.view(-1, edge * channels), values.view(-1, edge * channels)
        of_shift = _channel_mean(back, channels)
        of_scale = _channel_mean(torch.mul(back, wide, out=active), channels)
        # d/dx of normalised values: scale / sigma (g - mean(g) - x mean(g x)), means over the batch.
        slope = (scale * inverse).repeat(edge)
        wide.mul_(-mean_over_ranks(of_scale.clone()).repeat(edge))
        wide.add_(back).sub_(mean_over_ranks(of_shift.clone()).repeat(edge)).mul_(slope)
        count = values.numel() // channels
        wanted = [*context.needs_input_grad[:2], False]
        narrow = values.permute(0, 4, 1, 2, 3).to(volume.dtype)
        of_wrapped, grad_weight, _ = conv3d_backward(narrow, volume, kernel, padding=0, wanted=wanted)
        grad_input = None if of_wrapped is None else _unwrapped(of_wrapped)
        return grad_input, grad_weight, of_scale * count, of_shift * count, None


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """`value`, averaged over the ranks in place; itself where there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def cast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tensors` in the dtype in which autocast convolves on their device, if it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _wrapped(volume: torch.Tensor) -> torch.Tensor:
    """`volume` (B, C, D, H, W) with one voxel of its periodic images on every side."""
    batch, channels, *edges = volume.shape
    rows = volume.new_empty(batch, *(edge + 2 for edge in edges), channels)
    rows[:, 1:-1, 1:-1, 1:-1] = volume.permute(0, 2, 3, 4, 1)
    for axis in (3, 2, 1):
        rows.select(axis, 0).copy_(rows.select(axis, -2))
        rows.select(axis, -1).copy_(rows.select(axis, 1))
    return rows.permute(0, 4, 1, 2, 3)


def _unwrapped(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of what was wrapped by that of the result, which it changes."""
    for axis in (2, 3, 4):
        gradient.select(axis, -2).add_(gradient.select(axis, 0))
        gradient.select(axis, 1).add_(gradient.select(axis, -1))
    return gradient[:, :, 1:-1, 1:-1, 1:-1]


def _rows(volume: torch.Tensor) -> torch.Tensor:
    """(B, C, D, H, W) as it lies in channels-last memory, (B, D, H, W, C), contiguous."""
    return volume.permute(0, 2, 3, 4, 1).contiguous()


def _wide(values: torch.Tensor) -> torch.Tensor:
    """(B, D, H, W, C) by cells along D and H, a line along W each: (B D/2, 2, H/2, 2, W C), the same memory.

    Lines are long, so that what is done with them is vectorised whatever C is.
    """
    batch, depth, height, width, channels = values.shape
    return values.view(batch * depth // 2, 2, height // 2, 2, width * channels)


def _along(pooled: torch.Tensor) -> torch.Tensor:
    """(B, C, D/2, H/2, W/2), each value twice along W, to go with `_wide`: (B D/2, 1, H/2, 1, W C)."""
    rows = _rows(pooled)
    batch, depth, height, width, channels = rows.shape
    twice = rows.unsqueeze(4).expand(-1, -1, -1, -1, 2, -1)
    return twice.reshape(batch * depth, 1, height, 1, 2 * width * channels)


def _average(values: torch.Tensor) -> torch.Tensor:
    """The mean of each cell of 2^3 voxels of (B, D, H, W, C): (B, C, D/2, H/2, W/2)."""
    batch, depth, height, width, channels = values.shape
    cells = _wide(values)
    total = cells[:, 0, :, 0] + cells[:, 0, :, 1]
    total += cells[:, 1, :, 0]
    total += cells[:, 1, :, 1]
    pairs = total.view(-1, width // 2, 2, channels)
    mean = (pairs[:, :, 0] + pairs[:, :, 1]).mul_(0.125)
    return mean.view(batch, depth // 2, height // 2, width // 2, channels).permute(0, 4, 1, 2, 3)


def _channel_mean(wide: torch.Tensor, channels: int) -> torch.Tensor:
    """The mean of each channel (C,) over (lines, W C)."""
    return wide.mean(0).view(-1, channels).mean(0)
