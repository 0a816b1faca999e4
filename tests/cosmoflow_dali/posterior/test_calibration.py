"""Calibration of posteriors that are perfect, and of those that are wrong in a known way."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from cosmoflow_dali.posterior.calibration import Calibration, calibrate, rank_truths, uniform_p

NAMES = ("a", "b", "c", "d")


def _calibrate(universes: int, *, seed: int = 0, width: float = 1.0, shift: float = 0.0) -> Calibration:
    """Calibrate Gaussian posteriors of correlated parameters, `width` times as wide, off by `shift` sigma."""
    rng = np.random.default_rng(seed)
    factor = np.linalg.cholesky(np.full((4, 4), 0.5) + np.diag([0.5, 1.0, 2.0, 4.0]))
    centres = rng.normal(0, 3, (universes, 4))
    truths = centres + rng.standard_normal((universes, 4)) @ factor.T
    sigma = np.linalg.norm(factor, axis=1)
    noise = rng.standard_normal((universes, 399, 4)) @ factor.T
    draws = centres[:, None] + width * noise + shift * sigma
    references = centres + rng.normal(0, 0.5, centres.shape)
    return calibrate(rank_truths(draws, truths, references), NAMES, universes)


def test_a_perfect_posterior_passes() -> None:
    result = _calibrate(4096)
    assert not result.failures
    assert result.verdict.startswith("calibrated")


def test_an_overconfident_posterior_fails_every_kind_of_test() -> None:
    result = _calibrate(4096, width=0.8)
    assert (result.coverage < np.array([[0.68], [0.95]]) - result.coverage_limits[:, None]).all()
    assert (result.ks_p < 0.0025).all()
    assert result.tarp_area < -result.tarp_limit
    assert len(result.failures) == 13
    assert result.verdict.startswith("not calibrated: 68% intervals of a hold ")


def test_a_shifted_posterior_fails() -> None:
    result = _calibrate(4096, shift=0.15)
    assert (result.ks_p < 0.0025).all()
    assert result.verdict.startswith("not calibrated")


def test_a_posterior_that_ignores_the_data_fails_tarp_alone() -> None:
    rng = np.random.default_rng(0)
    truths = rng.uniform(-1, 1, (2048, 4))
    references = truths + rng.normal(0, 0.3, truths.shape)
    ranks = rank_truths(rng.uniform(-1, 1, (2048, 399, 4)), truths, references)
    result = calibrate(ranks, NAMES, 2048)
    assert len(result.failures) == 1
    assert result.tarp_area > 0.2


def test_limits_are_three_standard_deviations() -> None:
    result = _calibrate(256)
    np.testing.assert_allclose(result.coverage_limits, 3 * np.sqrt([0.68 * 0.32, 0.95 * 0.05]) / 16)
    assert result.tarp_limit == pytest.approx(3 * math.sqrt(1 / 12) / 16)
    # 13 tests of a perfect posterior, each at the level of three standard deviations.
    failed = sum(bool(_calibrate(256, seed=seed).failures) for seed in range(60))
    assert failed <= 6


def test_fewer_universes_than_samples_widen_the_limits() -> None:
    rng = np.random.default_rng(1)
    draws, truths = rng.standard_normal((400, 99, 4)), rng.standard_normal((400, 4))
    ranks = rank_truths(draws, truths, np.zeros((400, 4)))
    all_, few = calibrate(ranks, NAMES, 400), calibrate(ranks, NAMES, 50)
    assert (few.coverage_limits > 2 * all_.coverage_limits).all()
    assert few.tarp_limit > 2 * all_.tarp_limit
    assert (few.ks_p >= all_.ks_p).all()


@pytest.mark.parametrize("sample", [np.linspace(0.001, 0.999, 300) ** power for power in (1.0, 1.1, 1.3)])
def test_p_value_is_that_of_scipy(sample: npt.NDArray[np.float64]) -> None:
    expected = stats.kstest(sample, "uniform").pvalue
    assert uniform_p(sample, len(sample)) == pytest.approx(expected, rel=0.05, abs=1e-9)
