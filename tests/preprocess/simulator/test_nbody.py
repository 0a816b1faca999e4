"""Physics of universes: the initial field, its growth, and convergence with the number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipelines.sample import REDSHIFTS
from preprocess.simulator.cosmology import Cosmology, PowerSpectrum, growth
from preprocess.simulator.nbody import evolve, linear_modes, step_redshifts

MEAN = Cosmology(omega_m=0.3, sigma_8=0.8, n_s=0.96, H_0=70.0)
FALLING = sorted(REDSHIFTS, reverse=True)
Array = npt.NDArray[Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linear_field(size: int, box: float, seed: int) -> Array:
    modes = linear_modes(PowerSpectrum(MEAN), size, box, np.random.default_rng(seed))
    return torch.fft.irfftn(modes, s=(size,) * 3).numpy().astype(np.float64)


def universe(size: int, box: float, seed: int, steps: int) -> dict[float, Array]:
    """Return counts (size, size, size) by redshift."""
    modes = linear_modes(PowerSpectrum(MEAN), size, box, np.random.default_rng(seed))
    stops, recorded = step_redshifts(FALLING, steps)
    return dict(zip(FALLING, evolve(modes, growth(MEAN.omega_m, stops), recorded), strict=True))


def power(field: Array, box: float) -> tuple[Array, Array]:
    """Return |n| and P(k) in (Mpc/h)^3 of every mode of `field`, by NumPy's transform."""
    size = len(field)
    n = np.fft.fftfreq(size, 1.0 / size)
    radius = np.sqrt(n[:, None, None] ** 2 + n[None, :, None] ** 2 + n[None, None, :] ** 2)
    return radius, np.abs(np.fft.fftn(field)) ** 2 * box**3 / size**6


def test_initial_field_has_the_input_spectrum() -> None:
    size, box, seeds = 64, 256.0, 16
    measured = np.mean([power(linear_field(size, box, seed), box)[1] for seed in range(seeds)], axis=0)
    radius, _ = power(np.zeros((size,) * 3), box)
    expected = np.zeros_like(radius)
    inside = radius > 0
    expected[inside] = PowerSpectrum(MEAN)(2 * np.pi / box * radius[inside])
    bins = 0
    for low in range(1, size // 2, 2):
        chosen = (radius >= low) & (radius < low + 2)
        # A mode and its mirror image are one draw; its power has a relative standard deviation of 1.
        scatter = 1.0 / np.sqrt(seeds * chosen.sum() / 2)
        if 3 * scatter > 0.05:
            continue
        bins += 1
        assert measured[chosen].sum() == pytest.approx(expected[chosen].sum(), rel=0.05)
    assert bins >= 14


def test_initial_field_has_the_requested_sigma_8() -> None:
    size, box = 64, 256.0
    radius, _ = power(np.zeros((size,) * 3), box)
    x = np.maximum(8.0 * 2 * np.pi / box * radius, 1e-6)
    sphere = np.where(radius > 0, 3.0 * (np.sin(x) - x * np.cos(x)) / x**3, 1.0)
    variances = [
        np.fft.ifftn(np.fft.fftn(linear_field(size, box, seed)) * sphere).real.var() for seed in range(16)
    ]
    assert np.sqrt(np.mean(variances)) == pytest.approx(0.8, rel=0.02)


@pytest.mark.parametrize("voxel", [2.0, 4.0, 8.0])
def test_largest_scales_follow_linear_growth(voxel: float) -> None:
    # Coarse voxels are the difficult case: particles have hardly moved by z = 3.
    size, box = 64, 64 * voxel
    ratios: dict[float, list[float]] = {z: [] for z in FALLING}
    for seed in range(4):
        counts = universe(size, box, seed, steps=4)
        powers = {}
        for z, count in counts.items():
            radius, spectrum = power(count.astype(np.float64), box)
            powers[z] = spectrum[(radius > 0) & (radius < 2.5)].sum()
        for z in FALLING:
            ratios[z].append(powers[z] / powers[0.0])
    for z, linear in zip(FALLING, growth(MEAN.omega_m, FALLING), strict=True):
        assert np.sqrt(np.mean(ratios[z])) == pytest.approx(linear.first, rel=0.05), z


def test_number_of_particles_is_constant() -> None:
    for z, counts in universe(32, 128.0, 5, steps=4).items():
        assert counts.dtype == np.int16 and counts.min() >= 0
        assert counts.sum() == 32**3, z


def test_clustering_grows_with_time_and_sigma_8() -> None:
    by_time = [counts.var() for counts in universe(32, 128.0, 2, steps=4).values()]
    assert by_time == sorted(by_time)


def one_point(counts: Array) -> Array:
    """Return the fraction of empty voxels, the variance, and the fraction with more than 5 particles."""
    return np.array([(counts == 0).mean(), counts.var(), (counts > 5).mean()])


def test_four_steps_agree_with_many() -> None:
    # The bounds of docs/simulator.md for 4 steps compared with 32: empty voxels within 0.5%, the variance
    # within 5%, the tail within 3%. (z = 3 is one 2LPT step in both.)
    few, many = (
        {z: np.mean([one_point(universes[z]) for universes in runs], axis=0) for z in FALLING}
        for runs in ([universe(32, 128.0, seed, steps) for seed in range(6)] for steps in (4, 32))
    )
    for z in FALLING[1:]:
        np.testing.assert_array_less(np.abs(few[z] / many[z] - 1.0), [0.005, 0.05, 0.03], err_msg=f"z = {z}")


def test_steps_stop_at_every_redshift_in_order() -> None:
    for steps in range(4, 20):
        stops, recorded = step_redshifts(FALLING, steps)
        assert len(stops) == steps
        assert list(stops) == sorted(stops, reverse=True)
        assert [z for z, wanted in zip(stops, recorded, strict=True) if wanted] == FALLING
