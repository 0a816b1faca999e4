"""Ridge regression on data whose dependence is known."""

from __future__ import annotations

import numpy as np
import pytest

from cosmoflow_dali.posterior.ridge import fit_ridge, split_universes


def test_recovers_a_linear_law_and_predicts_the_mean_of_noise() -> None:
    rng = np.random.default_rng(0)
    summaries = rng.normal(3, [1, 10, 0.1], (400, 3))
    linear = summaries @ [0.5, -0.1, 4.0] + 1
    targets = np.stack([linear, rng.uniform(-1, 1, 400)], axis=1)
    ridge, held_out = fit_ridge(summaries, targets, np.arange(400))
    np.testing.assert_allclose(held_out[:, 0], linear, atol=1e-3)
    np.testing.assert_allclose(ridge.predict(summaries)[:, 0], linear, atol=1e-3)
    # Each target has a penalty of its own: the other's law does not make this one follow its noise.
    assert ridge.predict(summaries)[:, 1].std() < 0.1
    assert np.abs(held_out[:, 1]).max() < 0.3


def test_predictions_out_of_fold_are_blind_to_their_own_universe() -> None:
    # As many summaries as samples: a fit reproduces its own samples, and knows nothing of others.
    rng = np.random.default_rng(1)
    codes = rng.standard_normal((60, 200))
    universes = np.repeat(np.arange(60), 3)
    summaries, targets = codes[universes], rng.uniform(-1, 1, (60, 1))[universes]
    _, held_out = fit_ridge(summaries, targets, universes)
    assert np.corrcoef(held_out[:, 0], targets[:, 0])[0, 1] < 0.5
    # If crops of a universe were in two folds, each would reveal the others' targets.
    _, leaked = fit_ridge(summaries, targets, rng.permutation(180))
    assert np.corrcoef(leaked[:, 0], targets[:, 0])[0, 1] > 0.9


def test_constant_summaries_have_no_weight() -> None:
    rng = np.random.default_rng(2)
    varying = rng.standard_normal((50, 1))
    ridge, _ = fit_ridge(np.hstack([varying, np.full((50, 1), -7.3)]), varying, np.arange(50))
    np.testing.assert_array_equal(ridge.weights[1], 0)
    assert np.isfinite(ridge.predict(np.array([[0.5, 3.0]]))).all()


@pytest.mark.parametrize(("universes", "parts"), [(7, 3), (2, 5), (10, 10)])
def test_parts_hold_each_universe_once(universes: int, parts: int) -> None:
    of_sample = np.random.default_rng(3).integers(100, 100 + universes, 40)
    found = split_universes(of_sample, parts)
    assert sorted(np.concatenate(found)) == list(range(40))
    assert len(found) == min(parts, len(set(of_sample)))
    assert sum(len(set(of_sample[part])) for part in found) == len(set(of_sample))
