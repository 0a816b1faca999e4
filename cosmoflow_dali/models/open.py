"""A small network for the open division and for small machines.

Its structure uses three properties of the data: a periodic box has no edges (circular padding), the targets
do not depend on the position of a halo (global pooling), and the redshifts differ in scale (standardised
input). Batch normalisation lets it converge in a few epochs.

With `multiscale`, each block also reads the counts in cells of its scale, and the dense layers read the means
of all blocks instead of the last one's: statistics of one point after smoothing hold much of what
there is to know about the parameters; see docs/posteriors.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from cosmoflow_dali.models.blocks import LEAK, norm_block, wrapped
from cosmoflow_dali.models.checkpointed import checkpointed_norm_block, split_depth
from cosmoflow_dali.models.halo import add_halos, join_slabs, mean_over_group
from cosmoflow_dali.models.reference import OUTPUT_SCALE
from pipelines.errors import check_field
from pipelines.sample import PARAMETERS, REDSHIFTS


@dataclass(frozen=True, slots=True)
class OpenConfig:
    """Shape of the open network.

    Args:
        kind: Selects this network.
        size: Edge of a sample in voxels.
        widths: Filters of each convolution block; each block halves the edge.
        hidden: Width of the dense layer.
        multiscale: Each block reads counts in cells, and the dense layers read the means of all blocks.
    """

    kind: Literal["open"] = "open"
    size: int = 32
    widths: tuple[int, ...] = (8, 16, 32, 64)
    hidden: int = 64
    multiscale: bool = False

    def __post_init__(self) -> None:
        valid = len(self.widths) > 0 and min(self.widths) >= 1
        check_field(self, "widths", valid, "must be one width or more, each at least 1")
        check_field(self, "hidden", self.hidden >= 1, "must be at least 1")
        factor = 2 ** len(self.widths)
        valid = self.size >= 1 and self.size % factor == 0
        check_field(self, "size", valid, f"must be a multiple of {factor}, as blocks halve it")


class OpenCosmoFlow(nn.Module):
    """The open network: (B, 4, D, H, W) to targets (B, 4).

    Attributes:
        checkpoint_blocks: Number of first blocks that keep their input alone.
        group: Ranks that share every sample: the input is this rank's slab of it, along D, between one plane
            of each neighbour, (B, 4, d + 2, H, W). None for whole samples.
        periodic: Beyond the ends of a volume are the planes of the other end.
    """

    checkpoint_blocks = 0
    group: dist.ProcessGroup | None = None
    periodic = True
    input_mean: torch.Tensor
    input_std: torch.Tensor

    def __init__(self, config: OpenConfig, seed: int = 0) -> None:
        """Draw Glorot-uniform kernels from `seed`; set biases to zero. Call `fit_input` before training."""
        super().__init__()
        self.config = config
        cells = len(REDSHIFTS) if config.multiscale else 0
        inputs = [len(REDSHIFTS), *(width + cells for width in config.widths[:-1])]
        pairs = zip(inputs, config.widths, strict=True)
        self.convs = nn.ModuleList(nn.Conv3d(a, b, 3, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm3d(width) for width in config.widths)
        means = sum(config.widths) if config.multiscale else config.widths[-1]
        self.denses = nn.ModuleList(
            [nn.Linear(means, config.hidden), nn.Linear(config.hidden, len(PARAMETERS))]
        )
        self.register_buffer("input_mean", torch.zeros(1, len(REDSHIFTS), 1, 1, 1))
        self.register_buffer("input_std", torch.ones(1, len(REDSHIFTS), 1, 1, 1))
        generator = torch.Generator().manual_seed(seed)
        for layer in (*self.convs, *self.denses):
            nn.init.xavier_uniform_(layer.get_parameter("weight"), generator=generator)
        for dense in self.denses:
            nn.init.zeros_(dense.get_parameter("bias"))
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def fit_input(self, mean: npt.NDArray[np.float32], std: npt.NDArray[np.float32]) -> None:
        """Standardise the input by each redshift's `mean` and `std`, (4,) each, kept in the state dict."""
        self.input_mean.copy_(torch.from_numpy(mean).reshape(self.input_mean.shape))
        self.input_std.copy_(torch.from_numpy(std).reshape(self.input_std.shape))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Return targets (B, 4) of log counts `volume` (B, 4, D, H, W)."""
        return self._head(self._means(volume))

    def features(self, volume: torch.Tensor) -> torch.Tensor:
        """Return what posteriors are fitted to: targets (B, 4), and the means that the dense layers read."""
        means = self._means(volume)
        return torch.cat([self._head(means), means], dim=1)

    def _means(self, volume: torch.Tensor) -> torch.Tensor:
        """Return the mean activations (B, n) of the last block, or of all."""
        hidden = torch.addcmul(-self.input_mean / self.input_std, volume, 1 / self.input_std)
        group, each, counts = self.group, [], None
        if self.config.multiscale:
            counts = (volume if group is None else volume[:, :, 1:-1]).expm1()
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if counts is not None and level:
                counts = functional.avg_pool3d(counts, 2)
            if group is not None and hidden.shape[2] % 2:
                hidden = join_slabs(hidden, group)
                counts = counts if counts is None else join_slabs(counts, group)
                group = None
            if counts is not None and level:
                # Log counts in cells of 8^level voxels, less that of a uniform universe.
                cells = (8**level * counts).log1p() - math.log1p(8**level)
                hidden = torch.cat([hidden, cells / self.input_std], dim=1)
            if group is not None and level:
                hidden = add_halos(hidden, group, periodic=True)
            checkpointed = level < self.checkpoint_blocks
            hidden = self._block(hidden, conv, norm, checkpointed=checkpointed, halos=group is not None)
            each.append(hidden.mean(dim=(2, 3, 4)))
        means = each[-1] if counts is None else torch.cat(each, dim=1)
        if self.group is not None:
            means = mean_over_group(means, self.group)
        # 0.28 is that of a normal variable behind LeakyReLU. Universes differ by about a tenth.
        return means if counts is None else 10 * (means - 0.28)

    def _head(self, means: torch.Tensor) -> torch.Tensor:
        hidden = functional.leaky_relu(self.denses[0](means), LEAK)
        return OUTPUT_SCALE * torch.tanh(self.denses[1](hidden))

    def _block(
        self, volume: torch.Tensor, conv: nn.Module, norm: nn.Module, *, checkpointed: bool, halos: bool
    ) -> torch.Tensor:
        assert isinstance(conv, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d | nn.SyncBatchNorm)
        if self.training and (checkpointed or volume.device.type == "cpu"):
            block = checkpointed_norm_block if checkpointed else norm_block
            pooled, mean, variance = block(volume, conv.weight, norm.weight, norm.bias, norm.eps, halos=halos)
            # Ranks that have joined their slabs have equal values.
            copies = 1 if halos or self.group is None else dist.get_world_size(self.group)
            update_running_stats(norm, mean, variance, 8 * pooled.numel() // pooled.shape[1], copies)
            return pooled
        if checkpointed:
            depth = volume.shape[2] - 2 if halos else volume.shape[2]
            parts = (wrapped(volume, *part, halos=halos) for part in split_depth(depth))
            return torch.cat([_pool(norm(conv(part))) for part in parts], dim=2)
        return _pool(norm(conv(wrap(volume, (3, 4) if halos else (2, 3, 4)))))


def _pool(values: torch.Tensor) -> torch.Tensor:
    return functional.avg_pool3d(functional.leaky_relu(values, LEAK), 2)


@torch.no_grad()
def update_running_stats(
    norm: nn.BatchNorm3d | nn.SyncBatchNorm,
    mean: torch.Tensor,
    variance: torch.Tensor,
    count: int,
    copies: int = 1,
) -> None:
    """Update the running statistics of `norm` from a global batch's mean and biased variance, (C,) each.

    Args:
        count: Values per channel on this rank.
        copies: Number of ranks that have the same values.
    """
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    count = count * (dist.get_world_size() if dist.is_initialized() else 1) // copies
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    norm.num_batches_tracked += 1


def wrap(volume: torch.Tensor, axes: tuple[int, ...] = (2, 3, 4)) -> torch.Tensor:
    """Return `volume` (B, C, D, H, W) padded circularly by one voxel on either side along `axes`."""
    for axis in axes:
        first, last = volume.narrow(axis, 0, 1), volume.narrow(axis, volume.shape[axis] - 1, 1)
        volume = torch.cat([last, volume, first], dim=axis)
    return volume
