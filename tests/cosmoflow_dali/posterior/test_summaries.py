"""Summaries of fields whose statistics are known, and against direct sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cosmoflow_dali.posterior.summaries import (
    compute_summaries,
    cross_correlations,
    double_cells,
    joint_moments,
    log_histograms,
    log_sorted_means,
    log_spectra,
    num_basic_summaries,
    power_spectra,
)
from pipelines.sample import SampleSpec


def _fields(values: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def test_power_of_white_noise_is_its_variance_in_every_shell() -> None:
    noise = np.random.default_rng(0).normal(5.0, 3.0, (8, 2, 32, 32, 32))
    power = power_spectra(_fields(noise)).mean(dim=0).numpy()
    # Shell k has about 4 pi k^2 modes, half of them independent, in each of 8 fields.
    modes = 8 * 2 * math.pi * np.arange(1, 17) ** 2
    error = 9 / np.sqrt(modes)
    for channel in (0, 1):
        np.testing.assert_array_less(np.abs(power[channel, channel] - 9), 5 * error)
    np.testing.assert_array_less(np.abs(power[0, 1]), 5 * error)
    np.testing.assert_array_equal(power[0, 1], power[1, 0])


def test_power_of_a_wave_is_in_its_shell_with_its_amplitude() -> None:
    n, mode, amplitude, phase = 16, (2, -1, 2), 3.0, 0.7
    grid = np.stack(np.meshgrid(*3 * [np.arange(n)], indexing="ij"))
    angle = 2 * np.pi * np.tensordot(mode, grid, 1) / n
    waves = np.stack([10 + amplitude * np.cos(angle), 10 - 2 * amplitude * np.cos(angle + phase)])
    power = power_spectra(_fields(waves[None]))[0].numpy()
    # |F|^2 / n^3 is (amplitude / 2)^2 n^3 in the modes k and -k. All modes of shell 3 share it.
    frequency = np.fft.fftfreq(n, 1 / n)
    radius = np.sqrt(sum(np.square(np.meshgrid(*3 * [frequency], indexing="ij"))))
    mean = 2 * (amplitude / 2) ** 2 * n**3 / (np.round(radius) == 3).sum()
    expected = np.zeros((2, 2, n // 2))
    expected[..., 2] = mean * np.array([[1, -2 * np.cos(phase)], [-2 * np.cos(phase), 4]])
    np.testing.assert_allclose(power, expected, rtol=1e-4, atol=1e-4 * mean)
    assert log_spectra(_fields(power)[None])[0, 0, 2] == pytest.approx(math.log(mean), abs=1e-4)
    correlation = cross_correlations(_fields(power)[None])[0, 0, 2]
    assert math.tanh(correlation) == pytest.approx(-np.cos(phase), abs=1e-4)


def test_counts_of_a_poisson_field() -> None:
    mean, n = 2.5, 32
    counts = np.random.default_rng(1).poisson(mean, (1, 1, n, n, n))
    fields = _fields(counts)
    assert power_spectra(fields)[0, 0, 0, 8:].mean() == pytest.approx(mean, rel=0.03)
    shares = log_histograms(fields)[0, 0].exp().numpy()
    for bin_, count in enumerate(range(4)):
        probability = math.exp(-mean) * mean**count / math.factorial(count)
        assert shares[bin_] == pytest.approx(probability, rel=0.05)
    # A cell's count is Poisson with 8, 64 and 512 times the mean: nearly normal.
    cells = fields
    for edge in (2, 4):
        cells = double_cells(cells, edge // 2)
        assert cells.mean() == pytest.approx(mean * edge**3, rel=0.02)
        assert cells.var() == pytest.approx(mean * edge**3, rel=0.12)
    # The delta method: log(1 + N) has a standard deviation of 1 / sqrt(N).
    moments = joint_moments(cells)[0].numpy()
    assert moments[0] == pytest.approx(math.log(mean * 64), abs=0.02)
    assert math.exp(moments[1]) == pytest.approx(1 / math.sqrt(mean * 64), rel=0.1)
    assert moments[3] == pytest.approx(3, abs=0.3)


def test_cells_and_sorted_means_are_direct_sums() -> None:
    rng = np.random.default_rng(2)
    counts = rng.poisson(1.0, (2, 3, 8, 8, 8))
    fields = _fields(counts)
    cells = double_cells(double_cells(fields, 1), 2).numpy()
    for b, c, x, y, z in rng.integers(0, (2, 3, 8, 8, 8), (20, 5)):
        at = [np.arange(start, start + 4) % 8 for start in (x, y, z)]
        assert cells[b, c, x, y, z] == counts[b, c][np.ix_(*at)].sum()
    pieces = log_sorted_means(fields)[1, 2].exp().numpy() - 1
    ordered = np.sort(counts[1, 2], axis=None)
    assert pieces[0] == pytest.approx(ordered[: round(0.01 * 512)].mean())
    assert pieces[-1] == pytest.approx(ordered[round(0.995 * 512) :].mean())
    assert len(pieces) == 13


def test_moments_are_direct_means() -> None:
    counts = np.random.default_rng(3).poisson(4.0, (1, 4, 8, 8, 8))
    y = np.log1p(counts[0].reshape(4, -1))
    standard = (y - y.mean(axis=1, keepdims=True)) / y.std(axis=1, keepdims=True)
    expected = [*y.mean(axis=1), *np.log(y.std(axis=1))]
    expected += [(standard[i] * standard[j]).mean() for i, j in itertools.combinations(range(4), 2)]
    for order in (3, 4):
        for chosen in itertools.combinations_with_replacement(range(4), order):
            expected.append(standard[list(chosen)].prod(axis=0).mean())
    np.testing.assert_allclose(joint_moments(_fields(counts))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "channels", "number"), [(32, 4, 636), (12, 2, 94), (8, 1, 36), (2, 4, 123)])
def test_any_size_and_number_of_channels(size: int, channels: int, number: int) -> None:
    counts = np.random.default_rng(4).poisson(1.0, (3, size, size, size, channels)).astype(np.int16)
    summaries = compute_summaries(counts)
    assert summaries.shape == (3, number)
    assert np.isfinite(summaries).all()
    np.testing.assert_array_equal(compute_summaries(counts[1:2])[0], summaries[1])
    basic = num_basic_summaries(SampleSpec(size, channels))
    fields = _fields(np.moveaxis(counts, -1, 1))
    parts = log_spectra(power_spectra(fields)), log_histograms(fields)
    expected = np.hstack([part.flatten(1).numpy() for part in parts])
    np.testing.assert_allclose(summaries[:, :basic], expected, rtol=1e-5)


def test_symmetries_of_a_periodic_box_leave_summaries_unchanged() -> None:
    counts = np.random.default_rng(5).poisson(1.0, (1, 16, 16, 16, 4)).astype(np.int16)
    expected = compute_summaries(counts)
    for other in (np.roll(counts, (3, -5), (1, 3)), counts.transpose(0, 3, 1, 2, 4)):
        np.testing.assert_allclose(compute_summaries(other), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0, 1, 2**15 - 1])
def test_uniform_fields_have_finite_summaries(value: int) -> None:
    assert np.isfinite(compute_summaries(np.full((1, 32, 32, 32, 4), value, np.int16))).all()
