"""Symmetries of volumes: those of the cube, and those of simulated boxes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import Ranks

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def simulated(universes: int, crops: int) -> torch.Tensor:
    """Return the counts of simulated universes at z = 0 and 3, (universes * crops^3, 2, 32, 32, 32)."""
    config = SimulateConfig(crops=crops)
    counts = [
        sample.counts[..., [0, 3]]
        for number in range(universes)
        for _, sample in simulate_universe(config, "train", number)
    ]
    return torch.from_numpy(np.stack(counts)).permute(0, 4, 1, 2, 3).float()


def directional(volume: torch.Tensor) -> torch.Tensor:
    """Return two statistics of each sample along each axis e, (B, 6); N_z is the count at redshift z.

    - <N_3(x) (N_0(x + e) - N_0(x - e))>, which a mirror image has with the opposite sign.
    - <(N_3(x) - 1) (N_3(x + e) - 1)> over the last plane, where x + e is in the first, less its mean over the
      other planes: 0 on average if the box continues on the opposite side.
    """
    late, early = volume.contiguous().unbind(dim=1)
    statistics = []
    for axis in (1, 2, 3):
        slope = early * (late.roll(-1, axis) - late.roll(1, axis))
        neighbours = (early - 1) * (early.roll(-1, axis) - 1)
        planes = neighbours.movedim(axis, 1).mean(dim=(2, 3))
        statistics += [slope.mean(dim=(1, 2, 3)), planes[:, -1] - planes[:, :-1].mean(dim=1)]
    return torch.stack(statistics, dim=1)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return True if the mean of a statistic differs by more than five standard errors, for (B, 6) each."""
    variance = (one.var(dim=0) + other.var(dim=0)) / len(one)
    return bool(((one.mean(dim=0) - other.mean(dim=0)).abs() > 5 * variance.sqrt()).any())


@pytest.mark.usefixtures("one_thread")
def test_permutations_are_symmetries_of_simulated_universes_and_mirror_images_are_not() -> None:
    volume = simulated(universes=12, crops=1)
    given = directional(volume)
    for number, (axes, mirrored) in enumerate(augment.CUBE):
        image = directional(augment.apply(volume, True, number))
        assert differ(given, image) == any(mirrored), (axes, mirrored)


@pytest.mark.usefixtures("one_thread")
def test_shifts_are_symmetries_of_whole_boxes_and_not_of_crops() -> None:
    for crops, universes in ((1, 12), (2, 2)):
        volume = simulated(universes, crops)
        given = directional(volume)
        for number in (augment.draw(0, 0, step) for step in range(8)):
            image = directional(augment.apply(volume, "periodic", number))
            assert differ(given, image) == (crops == 2), (crops, number)


RANK = """
import itertools, sys, torch
import torch.distributed as dist
sys.path[1:1] = sys.argv[1:]
from test_networks_on_slabs import slab
from cosmoflow_dali.compute import augment

dist.init_process_group("gloo", init_method="env://")
volume = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(1))
for group in (dist.group.WORLD, dist.new_subgroups(2)[0]):
    place = dist.get_rank(group), dist.get_world_size(group)
    for kind, step in ((True, 1), ("periodic", 53)):
        for number, periodic in itertools.product(range(0, 48 * step, step), (False, True)):
            expected = slab(augment.apply(volume, kind, number), *place, periodic=periodic)
            own = slab(volume, *place, periodic=periodic)
            found = augment.apply(own, kind, number, group, periodic=periodic)
            assert found.is_contiguous(memory_format=torch.channels_last_3d)
            assert torch.equal(found, expected), (kind, number, periodic)
dist.barrier()
dist.destroy_process_group()
"""


def test_slabs_of_2_and_4_ranks_are_those_of_the_turned_volume(request: pytest.FixtureRequest) -> None:
    folder = request.path.parent
    line = [sys.executable, "-c", RANK, str(folder), str(folder.with_name("models"))]
    with Ranks(line, range(4), 4) as ranks:
        assert ranks.end(60) == ({0}, "")
