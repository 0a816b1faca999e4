"""Symmetries of a volume, which leave the cosmology unchanged; one is drawn for each global batch.

Which of them hold is a property of the data, so the configuration states it:

- `true`: the 48 rotations and reflections of the cube, for data whose voxels have no preferred direction.
- `periodic`: the 6 permutations of the axes and all periodic shifts, for whole simulated boxes. Their voxels
  lie a quarter off the lattice on which the particles start, along every axis alike; in a mirror image they
  would lie a quarter off to the other side.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Literal, TypeAlias

import torch

from pipelines.plan import derive_seed

Symmetries: TypeAlias = Literal[False, True, "periodic"]

_AXES = tuple(permutations((2, 3, 4)))
"""Orders of the axes D, H and W of a volume (B, C, D, H, W)."""

CUBE = tuple(product(_AXES, product((False, True), repeat=3)))
"""Pairs of an order of the axes and, for each of the three, True if it is then mirrored."""


def draw(seed: int, epoch: int, step: int) -> int:
    """Return the number of the symmetry of the global batch at `step` of `epoch`, the same on all ranks."""
    return derive_seed(seed, "symmetry", epoch, step)


def apply(volume: torch.Tensor, kind: Symmetries, number: int) -> torch.Tensor:
    """Apply symmetry `number`, modulo their number, to `volume` (B, C, D, H, W); return channels_last_3d."""
    return _shift(volume, number) if kind == "periodic" else _turn(volume, number)


def _turn(volume: torch.Tensor, number: int) -> torch.Tensor:
    axes, mirrored = CUBE[number % len(CUBE)]
    turned = volume.permute(0, 1, *axes)
    flipped = [axis for axis, mirror in zip((2, 3, 4), mirrored, strict=True) if mirror]
    if flipped:
        turned = turned.flip(flipped)
    return turned.contiguous(memory_format=torch.channels_last_3d)


def _shift(volume: torch.Tensor, number: int) -> torch.Tensor:
    number, order = divmod(number, len(_AXES))
    turned, size = volume.permute(0, 1, *_AXES[order]), volume.shape[-1]
    shifted = torch.empty_like(turned, memory_format=torch.channels_last_3d)
    # Along each axis, the two parts of a volume change places: eight blocks, each copied once.
    parts = []
    for axis in range(3):
        shift = number // size**axis % size
        moved = (slice(shift, None), slice(None, size - shift))
        wrapped = (slice(None, shift), slice(size - shift, None))
        parts.append((moved, wrapped))
    for block in product(*parts):
        (to_d, from_d), (to_h, from_h), (to_w, from_w) = block
        shifted[:, :, to_d, to_h, to_w] = turned[:, :, from_d, from_h, from_w]
    return shifted
