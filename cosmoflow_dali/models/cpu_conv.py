"""3^3 convolution and its gradients on a CPU, for few filters.

oneDNN computes as many filters at once as a vector register has lanes. Up to half of the lanes, two
neighbouring voxels along W are computed at once instead, by filters 4 voxels wide: the 3 of one voxel and the
3 of the other, padded with zeros. This multiplies a third more, in half as many steps. In channels-last
memory the result, (W/2, 2 C), is (W, C).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn import functional

Padding: TypeAlias = tuple[int, int, int]
"""Voxels of zeros on either side along D, H and W."""

LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""float32 lanes of a vector register."""


def conv3d(
    volume: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, padding: Padding
) -> torch.Tensor:
    """Convolve `volume` (B, c, D, H, W), zero-padded by `padding`, with `weight` (C, c, 3, 3, 3).

    Returns:
        (B, C, D', H', W'), each edge longer by 2 padding - 2; channels-last if `volume` is. `bias` (C,) is
        added.
    """
    if not _uses_pairs(weight.shape[0], volume):
        return functional.conv3d(volume, weight, bias, padding=padding)
    both_biases = None if bias is None else bias.repeat(2)
    rows = functional.conv3d(volume, _paired(weight), both_biases, (1, 1, 2), padding).permute(0, 2, 3, 4, 1)
    *edges, width, channels = rows.shape
    return rows.reshape(*edges, 2 * width, channels // 2).permute(0, 4, 1, 2, 3)


def conv3d_backward(
    grad_output: torch.Tensor,
    volume: torch.Tensor,
    weight: torch.Tensor,
    *,
    padding: Padding,
    output_mask: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of `conv3d` for input, weight and bias; None where `output_mask` is False."""
    grad_input = None
    if output_mask[0] and _uses_pairs(weight.shape[1], volume):
        flipped = weight.flip(2, 3, 4).transpose(0, 1)
        depth, height, width = padding
        full = 2 - depth, 2 - height, 2 - width
        grad_input = conv3d(grad_output, flipped, None, padding=full)
        output_mask = [False, *output_mask[1:]]
    stride = 1
    if pairs := _uses_pairs(weight.shape[0], volume):
        rows = grad_output.permute(0, 2, 3, 4, 1)
        *edges, width, channels = rows.shape
        grad_output = rows.reshape(*edges, width // 2, 2 * channels).permute(0, 4, 1, 2, 3)
        weight, stride = _paired(weight), 2
    found, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_output, volume, weight, [len(weight)], [1, 1, stride], padding, [1] * 3, False, [0] * 3, 1,
        output_mask,
    )  # fmt: skip
    if pairs and grad_weight is not None:
        grad_weight = grad_weight[:channels, ..., :3] + grad_weight[channels:, ..., 1:]
    if pairs and grad_bias is not None:
        grad_bias = grad_bias.view(2, channels).sum(0)
    return found if grad_input is None else grad_input, grad_weight, grad_bias


def _uses_pairs(filters: int, volume: torch.Tensor) -> bool:
    return volume.device.type == "cpu" and 2 * filters <= LANES and volume.shape[-1] % 2 == 0


def _paired(weight: torch.Tensor) -> torch.Tensor:
    """Return (2 C, c, 3, 3, 4): the filters of a voxel, followed by those of the next one."""
    both = torch.cat([functional.pad(weight, (0, 1)), functional.pad(weight, (1, 0))])
    return both.contiguous(memory_format=torch.channels_last_3d)
