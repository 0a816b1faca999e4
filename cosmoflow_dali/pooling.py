"""Max pooling whose gradient is the reference's on the CPU too.

TensorFlow's CPU kernel (tensorflow/core/kernels/pooling_ops_3d.cc) hands the gradient to every voxel
within 1e-5 of its cell's maximum, where torch and cuDNN choose one of them. Near-ties are not rare
in volumes that are half empty, so the two rules part by percents in the convolutions' gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

TIE = 1e-5
"""How near to the maximum of its cell a voxel is a maximum too; TensorFlow's constant."""


def max_pool(volume: torch.Tensor) -> torch.Tensor:
    """The maximum of each cell of 2^3 voxels of `volume` (B, C, D, H, W), all three edges even.

    The gradient is that of TensorFlow's kernel for the device: on a GPU both use cuDNN's.
    """
    if volume.device.type == "cpu":
        pooled: torch.Tensor = _TiedMaxPool.apply(volume)
        return pooled
    return functional.max_pool3d(volume, 2)


class _TiedMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, volume: torch.Tensor) -> torch.Tensor:
        pooled = functional.max_pool3d(volume, 2)
        context.save_for_backward(volume, pooled)
        return pooled

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        volume, pooled = context.saved_tensors
        # Each axis that is halved becomes (cells, 2), against (cells, 1) of what was pooled; in the
        # order in which channels-last memory lies, so that nothing is copied.
        batch, channels, *edges = volume.shape
        halved = [size for edge in edges for size in (edge // 2, 2)]
        cells = [size for edge in edges for size in (edge // 2, 1)]
        voxels = volume.permute(0, 2, 3, 4, 1).reshape(batch, *halved, channels)
        most = pooled.permute(0, 2, 3, 4, 1).reshape(batch, *cells, channels)
        share = gradient.permute(0, 2, 3, 4, 1).reshape(batch, *cells, channels)
        spread = torch.where(most - voxels < TIE, share, 0.0)
        return spread.reshape(batch, *edges, channels).permute(0, 4, 1, 2, 3)
