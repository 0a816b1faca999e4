"""The 48 symmetries of the cube: rotations and reflections, which leave the cosmology unchanged."""

from __future__ import annotations

from itertools import permutations, product

import torch

from pipelines.plan import derive_seed

SYMMETRIES = tuple(product(permutations((2, 3, 4)), product((False, True), repeat=3)))
"""Pairs of an order of the axes (D, H, W) and, for each of the three, True if it is then mirrored."""


def draw(seed: int, epoch: int, step: int) -> int:
    """Return the symmetry of the global batch at `step` of `epoch`, the same on all ranks."""
    return derive_seed(seed, "symmetry", epoch, step) % len(SYMMETRIES)


def apply(volume: torch.Tensor, symmetry: int) -> torch.Tensor:
    """Apply SYMMETRIES[symmetry] to `volume` (B, C, D, H, W); return it as channels_last_3d."""
    axes, mirrored = SYMMETRIES[symmetry]
    turned = volume.permute(0, 1, *axes)
    flipped = [axis for axis, mirror in zip((2, 3, 4), mirrored, strict=True) if mirror]
    if flipped:
        turned = turned.flip(flipped)
    return turned.contiguous(memory_format=torch.channels_last_3d)
