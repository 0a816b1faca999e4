"""The shift of posteriors between two data sets."""

from __future__ import annotations

import numpy as np
import pytest

from cosmoflow_dali.posterior.densities import ResidualGaussian
from cosmoflow_dali.posterior.fitted import Features
from cosmoflow_dali.posterior.scores import PosteriorScores, score_posterior
from cosmoflow_dali.reporting.shift import measure_shift

WIDTHS = np.array([0.1, 0.2, 0.05, 0.3])


def scored(ids: list[str], targets: np.ndarray, centres: np.ndarray) -> tuple[Features, PosteriorScores]:
    """Scores of Gaussians of widths WIDTHS around `centres`."""
    posterior = ResidualGaussian(np.diag(WIDTHS**2))
    scores = score_posterior(posterior, centres, targets, centres, len(ids), seed=0)
    return Features(tuple(ids), np.zeros((len(ids), 1)), None, targets), scores


def test_a_shift_is_in_standard_deviations_of_pairs() -> None:
    rng = np.random.default_rng(0)
    targets, ids = rng.uniform(-0.5, 0.5, (200, 4)), [f"universe_{index:04d}_000" for index in range(200)]
    first, first_scores = scored(ids, targets, targets)
    order = rng.permutation(200)
    moved = targets + [0.0, 0.5, -1.0, 0.1] * WIDTHS + rng.normal(0, 0.2, (200, 4)) * WIDTHS
    changed = targets.copy()
    changed[:50] += 0.01
    second, second_scores = scored([ids[at] for at in order], changed[order], moved[order])
    result = measure_shift(first, {"ridge": first_scores}, second, {"ridge": second_scores})
    assert result is not None and (result["pairs"], result["universes"]) == (150, 150)
    for name, expected in (("Omega_m", 0.0), ("sigma_8", 0.5), ("n_s", -1.0), ("H_0", 0.1)):
        found = result["posteriors"]["ridge"][name]
        # 0.2 from the second set, and the noise of 399 draws from both.
        assert found["standard_error"] == pytest.approx(np.hypot(0.2, (2 / 399) ** 0.5) / 150**0.5, rel=0.2)
        assert found["shift"] == pytest.approx(expected, abs=4 * found["standard_error"])


def test_without_pairs_there_is_none() -> None:
    targets = np.zeros((2, 4))
    first, second = scored(["a", "b"], targets, targets), scored(["c", "d"], targets, targets)
    assert measure_shift(first[0], {"ridge": first[1]}, second[0], {"ridge": second[1]}) is None
