"""Symmetries of volumes: those of the cube, and those of simulated boxes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cosmoflow_dali.compute import augment
from preprocess.simulator.universe import SimulateConfig, simulate_universe


def test_symmetries_are_those_of_the_cube() -> None:
    volume = torch.arange(3 * 27.0).reshape(1, 3, 3, 3, 3)
    images = {tuple(augment.apply(volume, True, number).flatten().tolist()) for number in range(48)}
    assert len(images) == 48
    # Neighbours remain neighbours, and the centre remains the centre.
    for number in range(48):
        turned = augment.apply(volume, True, number)[0, 0].flatten().tolist()
        a, b, c = (np.array(np.unravel_index(turned.index(value), (3, 3, 3))) for value in (0.0, 1.0, 13.0))
        assert np.abs(a - b).sum() == 1 and (c == 1).all()


def test_symmetries_of_a_periodic_box_are_permutations_and_shifts() -> None:
    volume = torch.arange(2 * 27.0).reshape(1, 2, 3, 3, 3)
    images = {tuple(augment.apply(volume, "periodic", number).flatten().tolist()) for number in range(6 * 27)}
    expected = {
        tuple(volume.permute(0, 1, *axes).roll(shifts, (2, 3, 4)).flatten().tolist())
        for axes in itertools.permutations((2, 3, 4))
        for shifts in itertools.product(range(3), repeat=3)
    }
    assert len(images) == 6 * 27
    assert images == expected


@pytest.mark.parametrize("kind", [True, "periodic"])
def test_channels_and_memory_format_are_preserved(kind: augment.Symmetries) -> None:
    volume = torch.randn(2, 4, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    for number in range(48):
        turned = augment.apply(volume, kind, 1000 * number + number)
        assert turned.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(turned.sum(dim=(2, 3, 4)), volume.sum(dim=(2, 3, 4)), rtol=1e-4, atol=1e-3)


def test_seed_and_position_determine_the_symmetry() -> None:
    drawn = [augment.draw(1, 0, step) for step in range(2000)]
    # All symmetries of the cube, and all shifts along an axis of 32 voxels.
    assert {number % 48 for number in drawn} == set(range(48))
    assert {number // 6 // 32**2 % 32 for number in drawn} == set(range(32))
    assert drawn == [augment.draw(1, 0, step) for step in range(2000)]
    assert drawn != [augment.draw(1, 1, step) for step in range(2000)]


def test_a_mirror_image_differs_from_simulated_universes_and_a_periodic_symmetry_does_not() -> None:
    config = SimulateConfig(train=16, validation=0)
    universes = [next(simulate_universe(config, "train", number))[1].counts for number in range(16)]
    volume = torch.from_numpy(np.stack(universes)).permute(0, 4, 1, 2, 3).float()

    def gradient(volume: torch.Tensor) -> torch.Tensor:
        """Return <N_3(x) (N_2(x + e) - N_2(x - e))> for each axis e: a mirror image has the opposite sign."""
        late, early = volume[:, 2], volume[:, 3]
        each = [
            (early * (late.roll(-1, axis) - late.roll(1, axis))).mean(dim=(1, 2, 3)) for axis in (1, 2, 3)
        ]
        return torch.stack(each, dim=1)

    measured = gradient(volume)
    error = measured.std(dim=0) / 4
    # Voxels off the lattice prefer a direction, along each axis and by the same amount.
    assert (measured.mean(dim=0) > 3 * error).all()
    mean = measured.mean()
    assert ((measured.mean(dim=0) - mean).abs() < 4 * error).all()
    for number in (augment.draw(0, 0, step) for step in range(20)):
        moved = gradient(augment.apply(volume, "periodic", number))
        torch.testing.assert_close(moved.sum(dim=1), measured.sum(dim=1), rtol=1e-3, atol=1e-4)
    point_reflection = augment.CUBE.index(((2, 3, 4), (True, True, True)))
    reflected = gradient(augment.apply(volume, True, point_reflection))
    torch.testing.assert_close(reflected.sum(dim=1), -measured.sum(dim=1), rtol=1e-3, atol=1e-4)
