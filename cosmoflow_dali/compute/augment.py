"""The 48 symmetries of the cube: rotations and reflections that no cosmology depends on."""

from __future__ import annotations

from itertools import permutations, product

import torch

from pipelines.plan import derive_seed

SYMMETRIES = tuple(product(permutations((2, 3, 4)), product((False, True), repeat=3)))
"""Each an order of the axes (D, H, W) and, for each of the three, whether it is then mirrored."""


def draw(seed: int, epoch: int, step: int) -> int:
    """The symmetry of the global batch at `step` of `epoch`: the same on every rank."""
    return derive_seed(seed, "symmetry", epoch, step) % len(SYMMETRIES)


def apply(volume: torch.Tensor, symmetry: int) -> torch.Tensor:
    """`volume` (B, C, D, H, W) under SYMMETRIES[symmetry], channels_last_3d."""
    axes, mirrored = SYMMETRIES[symmetry]
    turned = volume.permute(0, 1, *axes)
    flipped = [axis for axis, mirror in zip((2, 3, 4), mirrored, strict=True) if mirror]
    if flipped:
        turned = turned.flip(flipped)
    return turned.contiguous(memory_format=torch.channels_last_3d)
