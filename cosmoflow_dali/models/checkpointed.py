"""Convolution blocks that keep their input alone, for samples that barely fit in memory.

The backward pass computes a block again instead of keeping its activations. The first block has most of
them, and computed again as a whole it would need as much memory as before. So both passes go through it in
parts along D, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cosmoflow_dali.models.blocks import (
    LEAK,
    average_cells,
    cast,
    cells_of,
    channel_mean,
    fold_padding,
    max_block,
    mean_over_ranks,
    spread_along,
    to_rows,
    wrapped,
)
from cosmoflow_dali.models.cpu_conv import conv3d, conv3d_backward

PARTS, PLANES = 8, 16
"""Parts of a block at most, as the inputs of all blocks remain, and planes of a part at least.

`checkpointed_max_block` computes four planes of a part in vain.
"""


def split_depth(depth: int) -> list[tuple[int, int]]:
    """Return the first plane of each part and the one after its last; all are equal and have even edges."""
    count = PARTS
    while count > 1 and (depth % (2 * count) or depth < PLANES * count):
        count //= 2
    step = depth // count
    return [(first, first + step) for first in range(0, depth, step)]


def checkpointed_max_block(
    block: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    volume: torch.Tensor,
    kernel: torch.Tensor,
    bias: torch.Tensor,
    *,
    halos: bool = False,
) -> torch.Tensor:
    """Apply `block`, which computes `blocks.max_block`, in parts; the gradients differ by rounding."""
    depth = volume.shape[2] - 2 if halos else volume.shape[2]

    def planes(volume: torch.Tensor, first: int, last: int) -> torch.Tensor:
        if halos:
            return to_rows(max_block(volume[:, :, first : last + 2], kernel, bias, halos=True))
        # A cell more on either side: `block` pads with zeros, which are wrong inside the volume.
        low, high = max(first - 2, 0), min(last + 2, depth)
        pooled = block(volume[:, :, low:high], kernel, bias)
        return to_rows(pooled[:, :, (first - low) // 2 : (last - low) // 2])

    # A block draws no random numbers, and a CUDA graph cannot capture reading their state.
    pooled = [
        checkpoint(planes, volume, *part, use_reentrant=False, preserve_rng_state=False)
        for part in split_depth(depth)
    ]
    return torch.cat(pooled, dim=1).permute(0, 4, 1, 2, 3)


def checkpointed_norm_block(
    volume: torch.Tensor,
    kernel: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    *,
    halos: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply `blocks.norm_block` in parts, on any device; the results differ by rounding."""
    arguments = cast(volume, kernel)
    with torch.autocast(volume.device.type, enabled=False):
        pooled, mean, variance = _CheckpointedNormBlock.apply(*arguments, scale, shift, eps, halos)
    return pooled, mean, variance


class _CheckpointedNormBlock(torch.autograd.Function):
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
        channels, parts = len(kernel), split_depth(volume.shape[2] - 2 if halos else volume.shape[2])
        context.halos, context.parts = halos, parts

        # Functions, so that nothing of a part is left when the next one is computed.
        def moments(part: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
            wide = _lines(_convolved(wrapped(volume, *part, halos=halos), kernel, scale.dtype))
            center = channel_mean(wide, channels)
            wide.sub_(center.repeat(volume.shape[4]))
            return center, channel_mean(wide.square_(), channels)

        centers, spreads = map(torch.stack, zip(*map(moments, parts), strict=True))
        mean = mean_over_ranks(centers.mean(0))
        variance = mean_over_ranks((spreads + (centers - mean).square()).mean(0))
        inverse = torch.rsqrt(variance + eps)

        def pooled(part: tuple[int, int]) -> torch.Tensor:
            values = _normalised(wrapped(volume, *part, halos=halos), kernel, mean, inverse)
            active = functional.leaky_relu_(_scaled(values, scale, shift), LEAK)
            return to_rows(average_cells(active))

        context.save_for_backward(volume, kernel, scale, shift, mean, inverse)
        context.mark_non_differentiable(mean, variance)
        return torch.cat([pooled(part) for part in parts], dim=1).permute(0, 4, 1, 2, 3), mean, variance

    @staticmethod
    @once_differentiable
    def backward(
        context: Any, gradient: torch.Tensor, *grad_statistics: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        volume, kernel, scale, shift, mean, inverse = context.saved_tensors
        channels, (depth, _, width) = len(kernel), volume.shape[2:]
        halos, parts = context.halos, context.parts

        def recompute(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """Return the padded input, the lines of normalised values, and those of their gradient."""
            padded = wrapped(volume, first, last, halos=halos)
            values = _normalised(padded, kernel, mean, inverse)
            cells = cells_of(_scaled(values, scale, shift))
            spread = spread_along(gradient[:, :, first // 2 : last // 2] / 8).expand_as(cells)
            back = torch.ops.aten.leaky_relu_backward(spread, cells, LEAK, False)
            return padded, values, back.view(-1, width * channels)

        def scale_and_shift(part: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
            _, values, back = recompute(*part)
            return channel_mean(_lines(values).mul_(back), channels), channel_mean(back, channels)

        grad_scale, grad_shift = (
            torch.stack(each).mean(0) for each in zip(*map(scale_and_shift, parts), strict=True)
        )
        # The rule of `blocks.norm_block`: scale / sigma (g - mean(g) - x mean(g x)).
        slope, of_values = (scale * inverse).repeat(width), mean_over_ranks(grad_scale.clone()).repeat(width)
        constant = mean_over_ranks(grad_shift.clone()).repeat(width)
        grad_kernel = torch.zeros_like(kernel, dtype=scale.dtype)
        mask = [*context.needs_input_grad[:2], False]
        grad_volume = torch.zeros_like(volume) if mask[0] else None

        def through_convolution(part: tuple[int, int]) -> tuple[torch.Tensor | None, ...]:
            padded, values, back = recompute(*part)
            _lines(values).mul_(-of_values).add_(back).sub_(constant).mul_(slope)
            del back
            grad_values = values.permute(0, 4, 1, 2, 3).to(volume.dtype)
            return conv3d_backward(grad_values, padded, kernel, padding=(0, 0, 0), output_mask=mask)

        for first, last in parts:
            grad_padded, grad_weight, _ = through_convolution((first, last))
            if grad_weight is not None:
                grad_kernel += grad_weight
            if grad_volume is not None and grad_padded is not None:
                inside = grad_padded[..., 1:-1, 1:-1]
                fold_padding(grad_padded, 3, 4)
                if halos:
                    grad_volume[:, :, first : last + 2] += inside
                else:
                    grad_volume[:, :, first:last] += inside[:, :, 1:-1]
                    grad_volume[:, :, first - 1] += inside[:, :, 0]
                    grad_volume[:, :, last % depth] += inside[:, :, -1]
        count = 8 * gradient.numel() // gradient.shape[1]
        return grad_volume, grad_kernel.to(kernel.dtype), grad_scale * count, grad_shift * count, None, None


def _convolved(padded: torch.Tensor, kernel: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the convolution of `padded`, without padding, as rows of `dtype`."""
    return to_rows(conv3d(padded, kernel, None, padding=(0, 0, 0))).to(dtype)


def _normalised(
    padded: torch.Tensor, kernel: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """Return the convolution of `padded` less `mean`, times `inverse`, as rows."""
    values = _convolved(padded, kernel, mean.dtype)
    width = values.shape[3]
    _lines(values).sub_(mean.repeat(width)).mul_(inverse.repeat(width))
    return values


def _scaled(values: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return `values` times `scale` plus `shift`, as rows."""
    width = values.shape[3]
    return torch.addcmul(shift.repeat(width), _lines(values), scale.repeat(width)).view(values.shape)


def _lines(rows: torch.Tensor) -> torch.Tensor:
    """View rows (B, D, H, W, C) as lines (B D H, W C)."""
    return rows.view(-1, rows.shape[3] * rows.shape[4])
