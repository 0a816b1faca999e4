"""Scores of posteriors that have a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from cosmoflow_dali.posterior.densities import ResidualGaussian, UniformPrior
from cosmoflow_dali.posterior.scores import score_posterior


def test_prior_scores_are_those_of_a_uniform_distribution() -> None:
    rng = np.random.default_rng(0)
    targets = rng.uniform(-1, 1, (1500, 4))
    features = targets + rng.normal(0, 0.3, targets.shape)
    scores = score_posterior(UniformPrior(4), features, targets, features, 1500, seed=0)
    assert scores.nll == pytest.approx(4 * math.log(2))
    np.testing.assert_allclose(scores.mae, 0.5, atol=0.03)
    # It does not depend on the data, which TARP alone can see.
    assert len(scores.calibration.failures) == 1
    assert scores.to_json()["calibrated"] is False


def test_gaussian_scores_are_those_of_its_residuals() -> None:
    rng = np.random.default_rng(1)
    covariance = np.array([[0.04, 0.01, 0, 0], [0.01, 0.09, 0, 0], [0, 0, 0.01, -0.01], [0, 0, -0.01, 0.16]])
    features = rng.uniform(-1, 1, (1500, 4))
    residuals = rng.multivariate_normal(np.zeros(4), covariance, 20000)
    targets = features - residuals[:1500]
    posterior = ResidualGaussian(residuals.T @ residuals / len(residuals))
    exact = stats.multivariate_normal(np.zeros(4), residuals.T @ residuals / len(residuals))
    np.testing.assert_allclose(posterior.log_density(features, targets), exact.logpdf(residuals[:1500]))
    scores = score_posterior(posterior, features, targets, features, 1500, seed=0)
    expected = np.sqrt(2 / np.pi * covariance.diagonal())
    np.testing.assert_allclose(scores.mae, expected, rtol=0.06)
    assert scores.nll == pytest.approx(exact.entropy(), abs=4 * scores.nll_error)
    assert not scores.calibration.failures
    report = scores.to_json()
    assert report["mae"] == pytest.approx(scores.mae.mean())
    assert report["calibrated"] is True
