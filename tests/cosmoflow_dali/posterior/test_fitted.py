"""Posteriors from summaries, a network and both, fitted side by side."""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import norm

from cosmoflow_dali.posterior.fitted import (
    TITLES,
    Features,
    FittedPosteriors,
    fit_posteriors,
    join_features,
    number_universes,
)

Array = npt.NDArray[np.float64]

BASIC = 6
"""Summaries that the plain regression uses."""

NOISE = 0.2
"""Standard deviation of the noise of an output."""


def simulate(samples: int, seed: int, *, outputs: bool = True) -> Features:
    """Return features of independent universes.

    Every summary and output is a parameter with Gaussian noise: there are four summaries of each parameter,
    the noise of the first six is larger, and one output.
    """
    rng = np.random.default_rng(seed)
    targets = rng.uniform(-1, 1, (samples, 4))
    scale = np.where(np.arange(16) < BASIC, 0.8, 0.6)
    summaries = np.tile(targets, 4) + scale * rng.standard_normal((samples, 16))
    seen = targets + NOISE * rng.standard_normal((samples, 4)) if outputs else None
    names = tuple(f"set{seed}universe{index:05d}_000" for index in range(samples))
    return Features(names, summaries, seen, targets)


def nll(fitted: FittedPosteriors, features: Features) -> dict[str, float]:
    """Return the mean negative log-likelihood of the targets for each posterior."""
    return {
        name: -float(posterior.log_density(numbers, features.targets).mean())
        for name in fitted.names
        for posterior, numbers in [fitted.conditioned(name, features)]
    }


@pytest.fixture(scope="module")
def fitted() -> FittedPosteriors:
    return fit_posteriors(simulate(500, 0, outputs=False), simulate(700, 1), BASIC, seed=0)


def test_each_posterior_uses_more_of_a_universe(fitted: FittedPosteriors) -> None:
    assert fitted.names == list(TITLES) and fitted.best == "joined"
    scores = nll(fitted, simulate(2000, 2))
    assert scores["prior"] == pytest.approx(4 * math.log(2))
    assert scores["ridge"] < scores["prior"] - 0.1
    assert scores["summaries"] < scores["ridge"] - 0.1
    assert scores["network"] < scores["summaries"] - 0.1
    assert scores["joined"] < scores["network"] - 0.1


def test_scores_are_those_of_the_exact_posterior(fitted: FittedPosteriors) -> None:
    # Of an output u + noise under the uniform prior: a Gaussian cut at the prior's edges.
    fresh = simulate(2000, 3)
    assert fresh.outputs is not None
    low, high = ((sign - fresh.outputs) / NOISE for sign in (-1, 1))
    density = norm.logpdf(fresh.targets, fresh.outputs, NOISE) - np.log(norm.cdf(high) - norm.cdf(low))
    exact = -float(density.sum(axis=1).mean())
    found = nll(fitted, fresh)["network"]
    assert exact - 0.05 < found < exact + 0.4


def test_outputs_for_samples_that_the_network_was_trained_on_are_not_used() -> None:
    rest, calibration = simulate(40, 5), simulate(60, 6)
    # As of a network that knows its training samples by heart.
    known = Features(rest.ids, rest.summaries, rest.targets.copy(), rest.targets)
    blind = Features(rest.ids, rest.summaries, None, rest.targets)
    states = [fit_posteriors(part, calibration, BASIC, seed=1).state() for part in (known, blind)]
    for name in ("summaries", "network", "joined"):
        for key, tensor in states[0]["flows"][name].items():
            assert torch.equal(tensor, states[1]["flows"][name][key])


def test_posterior_does_not_trust_a_regression_on_its_own_samples() -> None:
    # With more summaries than samples, the regression knows its own samples far better than others.
    def wide(samples: int, seed: int) -> Features:
        rng, few = np.random.default_rng(seed + 50), simulate(samples, seed, outputs=False)
        summaries = np.hstack([few.summaries[:, :8], rng.standard_normal((samples, 200))])
        return Features(few.ids, summaries, None, few.targets)

    fresh = wide(1000, 10)
    fitted = fit_posteriors(None, wide(150, 9), BASIC, seed=0)
    posterior, numbers = fitted.conditioned("summaries", fresh)
    draws = posterior.sample(numbers, 99, 0)
    ratio = np.square(draws.mean(axis=1) - fresh.targets).mean() / draws.var(axis=1).mean()
    assert 0.7 < ratio < 1.4


def test_without_a_network_there_are_the_summaries_alone() -> None:
    calibration = simulate(80, 7, outputs=False)
    fitted = fit_posteriors(None, calibration, BASIC, seed=0)
    assert fitted.names == ["prior", "ridge", "summaries"] and fitted.best == "summaries"
    assert set(nll(fitted, calibration)) == {"prior", "ridge", "summaries"}


def test_saved_fit_is_the_same(fitted: FittedPosteriors) -> None:
    buffer = io.BytesIO()
    torch.save(fitted.state(), buffer)
    buffer.seek(0)
    again = FittedPosteriors.from_state(torch.load(buffer, weights_only=True))
    fresh = simulate(20, 8)
    assert again.names == fitted.names and again.best == fitted.best
    estimates = fitted.estimates("joined", fresh)
    np.testing.assert_array_equal(again.estimates("joined", fresh), estimates)
    for name in fitted.names:
        (one, numbers), (other, others) = (each.conditioned(name, fresh) for each in (fitted, again))
        np.testing.assert_array_equal(numbers, others)
        np.testing.assert_array_equal(
            one.log_density(numbers, fresh.targets), other.log_density(others, fresh.targets)
        )
        np.testing.assert_array_equal(one.sample(numbers, 30, 5), other.sample(others, 30, 5))


def test_joined_features_keep_outputs_only_if_all_parts_have_them() -> None:
    one, two, blind = simulate(3, 0), simulate(4, 1), simulate(2, 2, outputs=False)
    both = join_features([one, two])
    assert both.ids == one.ids + two.ids and len(both) == both.num_universes == 7
    assert both.outputs is not None and one.outputs is not None
    np.testing.assert_array_equal(both.outputs[:3], one.outputs)
    np.testing.assert_array_equal(both.targets[3:], two.targets)
    assert join_features([one, blind]).outputs is None


@pytest.mark.parametrize(
    ("names", "universes"),
    [
        (["a_000", "b_000", "a_001", "b_001"], [0, 1, 0, 1]),
        (["b_000", "a_1234", "a_000"], [1, 0, 0]),
        # Short numbers are not those of crops, and crops of one universe alone are taken as universes.
        (["sim_1", "sim_2", "sim_3"], [0, 1, 2]),
        (["sim_000", "sim_001", "sim_002"], [0, 1, 2]),
        (["cosmo_00012_007", "cosmo_00013_007", "cosmo_00012_000"], [0, 1, 0]),
    ],
)
def test_universe_is_the_name_without_the_crop(names: list[str], universes: list[int]) -> None:
    np.testing.assert_array_equal(number_universes(names), universes)
