"""One simulated universe: its settings, its name, and the samples that it is cut into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.errors import check_field
from pipelines.formats.registry import FORMATS
from pipelines.plan import derive_seed
from pipelines.sample import ALL_SPLITS, PARAMETERS, REDSHIFTS, Sample, SplitName
from pipelines.storage.location import Location
from preprocess.simulator.cosmology import Cosmology, PowerSpectrum, draw_target, growth
from preprocess.simulator.nbody import evolve, linear_modes, step_redshifts

SIZES = (32, 64, 128, 256, 512)
_MAX_MESH = 1024
_MAX_CROPS = 8

_PROGRAM_BYTES, _BYTES_PER_PARTICLE = 300 * 10**6, 72
"""Memory of a process that simulates, as measured; docs/simulator.md lists what is held."""

_LETTER: dict[SplitName, str] = {"train": "a", "validation": "b", "test": "c"}
"""First letter of a universe's number, so that the names of the splits differ."""


@dataclass(frozen=True, slots=True)
class SimulateConfig:
    """Contents of a simulated data set; equal settings give equal bytes.

    Args:
        train: Universes of the training split; each gives crops^3 samples.
        validation: Universes of the validation split.
        test: Universes of the test split, which no run reads.
        size: Voxels along each edge of a sample.
        voxel: Edge of a voxel in Mpc/h for H_0 = 70; it scales with H_0, as in the published data set.
        steps: Time steps, including the one to the first redshift.
        crops: Samples along each edge of a universe.
        seed: Seed; with the split and the number of a universe it determines the universe.
        format: File format; "tfrecord_gzip" is that of the published data set.
    """

    train: int = 4096
    validation: int = 512
    test: int = 0
    size: int = 32
    voxel: float = 4.0
    steps: int = 4
    crops: int = 1
    seed: int = 0
    format: str = "tfrecord_gzip"

    def __post_init__(self) -> None:
        for split in ALL_SPLITS:
            check_field(self, split, getattr(self, split) >= 0, "expected 0 or more universes")
        some = self.train + self.validation + self.test > 0
        check_field(self, "train", some, "with validation = 0 and test = 0 there is nothing to make")
        check_field(self, "size", self.size in SIZES, f"expected one of {', '.join(map(str, SIZES))}")
        positive = math.isfinite(self.voxel) and self.voxel > 0.0
        check_field(self, "voxel", positive, "expected a length above 0, in Mpc/h")
        enough = self.steps >= len(REDSHIFTS)
        check_field(self, "steps", enough, f"expected at least {len(REDSHIFTS)}, one a redshift")
        most = min(_MAX_CROPS, _MAX_MESH // self.size)
        check_field(self, "crops", 1 <= self.crops <= most, f"expected 1 to {most} for size = {self.size}")
        check_field(self, "seed", self.seed >= 0, "expected 0 or more")
        known = ", ".join(sorted(FORMATS))
        check_field(self, "format", self.format in FORMATS, f"expected one of {known}")

    @property
    def memory(self) -> int:
        """Bytes of memory that a process takes to simulate a universe, at most."""
        return _PROGRAM_BYTES + _BYTES_PER_PARTICLE * (self.size * self.crops) ** 3

    def sample_ids(self, split: SplitName, universe: int) -> list[str]:
        """IDs of a universe's samples: `<parent dir>_<universe>_<crop>`, as published."""
        return [f"univ_{_LETTER[split]}{universe:07d}_{crop:03d}" for crop in range(self.crops**3)]


def simulate_universe(
    config: SimulateConfig, split: SplitName, universe: int
) -> Iterator[tuple[str, Sample]]:
    """Yield the samples of one universe with their IDs, cut in C order (axis 0, then 1, then 2).

    Bit-identical on every run if PyTorch has one thread; other library versions or processors may
    round differently.
    """
    rng = np.random.default_rng(derive_seed(config.seed, "universe", split, universe))
    target = draw_target(rng)
    cosmology = Cosmology.from_target(target)
    mesh = config.size * config.crops
    box = mesh * config.voxel * cosmology.H_0 / PARAMETERS[3].mean
    order = sorted(range(len(REDSHIFTS)), key=lambda channel: -REDSHIFTS[channel])
    stops, recorded = step_redshifts([REDSHIFTS[channel] for channel in order], config.steps)
    counts = np.empty((mesh, mesh, mesh, len(REDSHIFTS)), dtype=np.int16)
    modes = linear_modes(PowerSpectrum(cosmology), mesh, box, rng)
    snapshots = evolve(modes, growth(cosmology.omega_m, stops), recorded)
    # `evolve` frees them.
    del modes
    for channel, snapshot in zip(order, snapshots, strict=True):
        counts[..., channel] = snapshot
    corners = itertools.product(range(0, mesh, config.size), repeat=3)
    for sample_id, (i, j, k) in zip(config.sample_ids(split, universe), corners, strict=True):
        n = config.size
        crop = counts[i : i + n, j : j + n, k : k + n]
        yield sample_id, Sample(np.ascontiguousarray(crop), target)


@dataclass(frozen=True, slots=True)
class SimulateTask:
    """Simulate one universe of `config` and write its samples below the folder `root`."""

    config: SimulateConfig
    root: Location

    def __call__(self, item: tuple[SplitName, int]) -> list[int]:
        """Simulate universe item[1] of split item[0]; return the lengths of the files written, in bytes."""
        split, universe = item
        # The bits must not depend on the number of cores.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [
                file.bytes
                for sample_id, sample in simulate_universe(self.config, split, universe)
                for file in FORMATS[self.config.format].write(self.root / split, sample_id, sample)
            ]
        finally:
            torch.set_num_threads(threads)
