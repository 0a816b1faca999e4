"""A 3^3 convolution and its gradients on a CPU, where few filters would leave registers half empty.

oneDNN computes as many filters at once as a vector register has lanes. Where the filters are no more than
half of the lanes, two neighbours along W are made at once, by filters 4 voxels wide: the 3 of the one and
the 3 of the other, in a row of zeros. That is a third more to multiply, in half as many steps. In
channels-last memory the result, (W/2, 2 C), is (W, C).
"""

from __future__ import annotations

import torch
from torch.nn import functional

LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""Numbers of float32 in a register, which sums are kept in."""


def conv3d(
    volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, *, padding: int
) -> torch.Tensor:
    """`volume` (B, c, D, H, W), `padding` zeros around it, by `kernel` (C, c, 3, 3, 3), plus `bias` (C,).

    (B, C, D', H', W'), each edge longer by 2 padding - 2, in channels-last memory if `volume` is.
    """
    if not _by_pairs(kernel.shape[0], volume):
        return functional.conv3d(volume, kernel, bias, padding=padding)
    both_biases = None if bias is None else bias.repeat(2)
    rows = functional.conv3d(volume, _paired(kernel), both_biases, (1, 1, 2), padding).permute(0, 2, 3, 4, 1)
    *edges, width, channels = rows.shape
    return rows.reshape(*edges, 2 * width, channels // 2).permute(0, 4, 1, 2, 3)


def conv3d_backward(
    gradient: torch.Tensor, volume: torch.Tensor, kernel: torch.Tensor, *, padding: int, wanted: list[bool]
) -> tuple[torch.Tensor | None, ...]:
    """Of volume, kernel and bias, those that are `wanted`, by the gradient of what `conv3d` made."""
    grad_input = None
    if wanted[0] and _by_pairs(kernel.shape[1], volume):
        turned = kernel.flip(2, 3, 4).transpose(0, 1)
        grad_input = conv3d(gradient, turned, None, padding=2 - padding)
        wanted = [False, *wanted[1:]]
    if not _by_pairs(kernel.shape[0], volume):
        found, *others = _backward(gradient, volume, kernel, 1, padding, wanted)
        return found if grad_input is None else grad_input, *others
    rows = gradient.permute(0, 2, 3, 4, 1)
    *edges, width, channels = rows.shape
    pairs = rows.reshape(*edges, width // 2, 2 * channels).permute(0, 4, 1, 2, 3)
    found, grad_weight, grad_bias = _backward(pairs, volume, _paired(kernel), 2, padding, wanted)
    if grad_weight is not None:
        grad_weight = grad_weight[:channels, ..., :3] + grad_weight[channels:, ..., 1:]
    if grad_bias is not None:
        grad_bias = grad_bias.view(2, channels).sum(0)
    return found if grad_input is None else grad_input, grad_weight, grad_bias


def _by_pairs(filters: int, volume: torch.Tensor) -> bool:
    return 2 * filters <= LANES and volume.shape[-1] % 2 == 0


def _paired(kernel: torch.Tensor) -> torch.Tensor:
    """(2 C, c, 3, 3, 4): the filters for a voxel, then those for the next one."""
    both = torch.cat([functional.pad(kernel, (0, 1)), functional.pad(kernel, (1, 0))])
    return both.contiguous(memory_format=torch.channels_last_3d)


def _backward(
    gradient: torch.Tensor,
    volume: torch.Tensor,
    kernel: torch.Tensor,
    stride: int,
    padding: int,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.aten.convolution_backward(
        gradient,
        volume,
        kernel,
        [kernel.shape[0]],
        [1, 1, stride],
        [padding] * 3,
        [1, 1, 1],
        False,
        [0, 0, 0],
        1,
        wanted,
    )
