"""3^3 convolution and its gradients on a CPU, for few filters.

oneDNN computes as many filters at once as a vector register has lanes. Up to half of the lanes, two
neighbouring voxels along W are computed at once instead, by filters 4 voxels wide: the 3 of one voxel and the
3 of the other, padded with zeros. This multiplies a third more, in half as many steps. In channels-last
memory the result, (W/2, 2 C), is (W, C).

torch computes small convolutions of a single sample without oneDNN, up to six times slower. Such a sample is
computed as two, the halves of its depth.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn import functional

Padding: TypeAlias = tuple[int, int, int]
"""Voxels of zeros on either side along D, H and W."""

LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""float32 lanes of a vector register."""

NATIVE_ROWS = 20480
"""Rows (C D H) of a single float32 sample up to which torch does without oneDNN.

See `use_mkldnn` in aten/src/ATen/native/Convolution.cpp.
"""


def conv3d(
    volume: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, padding: Padding
) -> torch.Tensor:
    """Convolve `volume` (B, c, D, H, W), zero-padded by `padding`, with `weight` (C, c, 3, 3, 3).

    Returns:
        (B, C, D', H', W'), each edge longer by 2 padding - 2; channels-last if `volume` is. `bias` (C,) is
        added.
    """
    if _is_native(volume, padding):
        halves = conv3d(_halves(volume, padding), weight, bias, padding=(0, *padding[1:]))
        return halves.permute(0, 2, 3, 4, 1).flatten(0, 1)[None].permute(0, 4, 1, 2, 3)
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
    if _is_native(volume, padding):
        grad_halves = grad_output.unflatten(2, (2, -1))[0].transpose(0, 1)
        found, *others = conv3d_backward(
            grad_halves,
            _halves(volume, padding),
            weight,
            padding=(0, *padding[1:]),
            output_mask=output_mask,
        )
        return None if found is None else _joined(found, padding), *others
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


def _is_native(volume: torch.Tensor, padding: Padding) -> bool:
    """Return whether torch would convolve `volume` without oneDNN and its output has an even depth."""
    small = len(volume) == 1 and volume[..., 0].numel() <= NATIVE_ROWS
    on_cpu = volume.device.type == "cpu" and volume.dtype == torch.float32
    return small and on_cpu and volume.shape[2] % 2 == 0 and volume.shape[2] + 2 * padding[0] > 2


def _halves(volume: torch.Tensor, padding: Padding) -> torch.Tensor:
    """Return what the halves of the output depend on, (2, c, D/2 + 1, H, W), of `volume` padded along D."""
    padded = functional.pad(volume, (0, 0, 0, 0, padding[0], padding[0])) if padding[0] else volume
    middle = padded.shape[2] // 2
    return torch.cat([padded[:, :, : middle + 1], padded[:, :, middle - 1 :]])


def _joined(gradient: torch.Tensor, padding: Padding) -> torch.Tensor:
    """Return the gradient of the input of `_halves` from that of its result."""
    first, last = gradient[:1], gradient[1:]
    shared = first[:, :, -2:] + last[:, :, :2]
    return torch.cat(
        [first[:, :, padding[0] : -2], shared, last[:, :, 2 : last.shape[2] - padding[0]]], dim=2
    )


def _paired(weight: torch.Tensor) -> torch.Tensor:
    """Return (2 C, c, 3, 3, 4): the filters of a voxel, followed by those of the next one."""
    both = torch.cat([functional.pad(weight, (0, 1)), functional.pad(weight, (1, 0))])
    return both.contiguous(memory_format=torch.channels_last_3d)
