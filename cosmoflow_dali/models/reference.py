"""The reference network of MLPerf HPC's CosmoFlow.

Five blocks of 3^3 convolution, LeakyReLU(0.3) and 2^3 max pooling, three dense layers, and an output of
1.2 tanh (mlcommons/hpc cosmoflow/models/cosmoflow.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from cosmoflow_dali.models.blocks import LEAK, max_block
from cosmoflow_dali.models.checkpointed import checkpointed_max_block
from cosmoflow_dali.models.halo import add_halos, join_slabs
from pipelines.errors import check_field
from pipelines.sample import PARAMETERS, REDSHIFTS

Block: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes a block from volume, kernel and bias; see `max_block`."""

OUTPUT_SCALE = 1.2
"""Scale of the output, whose range is wider than the targets', where tanh is not yet flat."""


@dataclass(frozen=True, slots=True)
class ReferenceConfig:
    """Shape of the reference network; the defaults are the benchmark's.

    Args:
        kind: Selects this network.
        size: Edge of a sample in voxels.
        blocks: Number of convolution blocks; each halves the edge.
        filters: Filters of the first block; each later block has twice as many.
        dense: Widths of the two hidden dense layers.
        dropout: Dropout rate after each hidden dense layer, at least 0 and below 1.
    """

    kind: Literal["reference"] = "reference"
    size: int = 128
    blocks: int = 5
    filters: int = 32
    dense: tuple[int, ...] = (128, 64)
    dropout: float = 0.5

    def __post_init__(self) -> None:
        for name in ("size", "blocks", "filters"):
            check_field(self, name, getattr(self, name) >= 1, "must be at least 1")
        factor = 2**self.blocks
        remedy = f"must be a multiple of {factor}, as blocks halve it"
        check_field(self, "size", self.size % factor == 0, remedy)
        valid = len(self.dense) == 2 and min(self.dense) >= 1
        check_field(self, "dense", valid, "must be two widths of at least 1")
        check_field(self, "dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")


class CosmoFlow(nn.Module):
    """The reference network: (B, 4, D, H, W) to targets (B, 4).

    Attributes:
        blocks: Function that computes each block.
        checkpoint_blocks: Number of first blocks that keep their input alone.
        group: Ranks that share every sample: the input is this rank's slab of it, along D, between one plane
            of each neighbour, (B, 4, d + 2, H, W). None for whole samples.
        periodic: Beyond the ends of a volume are the planes of the other end; here, zeros.
    """

    checkpoint_blocks = 0
    group: dist.ProcessGroup | None = None
    periodic = False

    def __init__(self, config: ReferenceConfig, seed: int = 0) -> None:
        """Draw Glorot-uniform kernels from `seed` and set biases to zero, as Keras does."""
        super().__init__()
        self.config = config
        self.blocks: list[Block] = [max_block] * config.blocks
        widths = [len(REDSHIFTS), *(config.filters * 2**block for block in range(config.blocks))]
        self.convs = nn.ModuleList(nn.Conv3d(a, b, 3, padding=1) for a, b in pairwise(widths))
        features = widths[-1] * (config.size // 2**config.blocks) ** 3
        self.denses = nn.ModuleList(
            nn.Linear(a, b) for a, b in pairwise([features, *config.dense, len(PARAMETERS)])
        )
        generator = torch.Generator().manual_seed(seed)
        for layer in (*self.convs, *self.denses):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Return targets (B, 4) of log counts `volume` (B, 4, D, H, W)."""
        hidden, group = volume, self.group
        for level, (block, conv) in enumerate(zip(self.blocks, self.convs, strict=True)):
            if group is not None and level:
                if hidden.shape[2] % 2:
                    hidden, group = join_slabs(hidden, group), None
                else:
                    hidden = add_halos(hidden, group, periodic=False)
            arguments = hidden, conv.get_parameter("weight"), conv.get_parameter("bias")
            if level < self.checkpoint_blocks:
                hidden = checkpointed_max_block(block, *arguments, halos=group is not None)
            else:
                hidden = block(*arguments) if group is None else max_block(*arguments, halos=True)
        if group is not None:
            hidden = join_slabs(hidden, group)
        # Keras flattens (D, H, W, C); the same order makes its dense kernels usable here.
        hidden = hidden.permute(0, 2, 3, 4, 1).flatten(1)
        for dense in self.denses[:-1]:
            hidden = functional.leaky_relu(dense(hidden), LEAK)
            hidden = functional.dropout(hidden, self.config.dropout, self.training)
        return OUTPUT_SCALE * torch.tanh(self.denses[-1](hidden))

    def features(self, volume: torch.Tensor) -> torch.Tensor:
        """Return what posteriors are fitted to: targets (B, 4)."""
        return self(volume)

    def decayed_parameters(self) -> list[nn.Parameter]:
        """Return the parameters subject to weight decay: the kernels of the hidden dense layers."""
        return [dense.get_parameter("weight") for dense in self.denses[:-1]]
