"""Neural posteriors of problems whose posterior is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import norm

from cosmoflow_dali.posterior.flow import FlowPosterior, fit_flow
from pipelines.sample import HALF_RANGE, PARAMETERS, to_physical

Array = npt.NDArray[np.float64]


def _simulate(samples: int, seed: int) -> tuple[Array, Array]:
    """Return z (n, 2), normal as under the uniform prior of u, and data x = A z + noise of variance 1."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((samples, 2))
    return z, z @ DESIGN.T + rng.standard_normal((samples, 2))


DESIGN = np.array([[1.0, 0.6], [-0.4, 0.8]])


@pytest.mark.slow
def test_linear_gaussian_posterior_has_the_known_mean_and_covariance() -> None:
    z, data = _simulate(32768, seed=0)
    posterior = fit_flow(data, 2 * norm.cdf(z) - 1, np.arange(len(z)), seed=0)
    covariance = np.linalg.inv(np.eye(2) + DESIGN.T @ DESIGN)
    _, observed = _simulate(400, seed=1)
    draws = norm.ppf((posterior.sample(observed, 999, seed=2) + 1) / 2)
    means, expected = draws.mean(axis=1), observed @ DESIGN @ covariance
    # The standard deviation of z is 1 under the prior: these are fractions of it.
    slopes, *_ = np.linalg.lstsq(expected, means, rcond=None)
    np.testing.assert_allclose(slopes, np.eye(2), atol=0.02)
    np.testing.assert_allclose(means.mean(axis=0), expected.mean(axis=0), atol=0.02)
    assert np.sqrt(np.square(means - expected).mean(axis=0)).max() < 0.05
    residuals = draws - draws.mean(axis=1, keepdims=True)
    found = np.einsum("ndi,ndj->ij", residuals, residuals) / (400 * 998)
    np.testing.assert_allclose(found, covariance, rtol=0.02, atol=0.02 * covariance.diagonal().mean())


@pytest.fixture(scope="module")
def fitted() -> FlowPosterior:
    z, data = _simulate(400, seed=3)
    return fit_flow(data, 2 * norm.cdf(z) - 1, np.arange(400), seed=0)


def test_density_integrates_to_one_over_the_prior_and_is_that_of_the_draws(fitted: FlowPosterior) -> None:
    # An even grid in z covers the edges of the box, where the density of u may be steep.
    edges = 2 * norm.cdf(np.linspace(-6, 6, 301)) - 1
    centres, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    grid = np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1).reshape(-1, 2)
    observed = np.array([0.8, -0.5])
    log_density = fitted.log_density(np.broadcast_to(observed, grid.shape).copy(), grid)
    mass = np.exp(log_density).reshape(300, 300) * np.outer(widths, widths)
    assert mass.sum() == pytest.approx(1, abs=2e-3)
    draws = fitted.sample(observed[None], 20000, seed=0)[0]
    assert mass.sum(axis=1) @ centres == pytest.approx(draws[:, 0].mean(), abs=0.01)
    assert mass.sum(axis=0) @ centres == pytest.approx(draws[:, 1].mean(), abs=0.01)


def test_draws_are_within_the_box_also_for_data_far_outside(fitted: FlowPosterior) -> None:
    draws = fitted.sample(np.array([[1e3, -1e3], [-30.0, 4.0]]), 500, seed=0)
    assert np.isfinite(draws).all()
    assert np.abs(draws).max() <= 1
    physical = to_physical(np.concatenate([draws, draws], axis=-1))
    means = np.array([parameter.mean for parameter in PARAMETERS])
    assert (np.abs(physical / means - 1) <= HALF_RANGE * (1 + 1e-12)).all()
    at_the_edge = fitted.log_density(np.zeros((1, 2)), np.array([[1.0, -1.0]]))
    assert np.isfinite(at_the_edge).all()


def test_same_seed_same_posterior_and_draws(fitted: FlowPosterior) -> None:
    z, data = _simulate(400, seed=3)
    torch.manual_seed(99)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    # The number of threads decides in which order torch adds numbers, but not here.
    torch.set_num_threads(threads + 1)
    try:
        again = fit_flow(data, 2 * norm.cdf(z) - 1, np.arange(400), seed=0)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(fitted.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    draws = fitted.sample(data[:3], 50, seed=1)
    np.testing.assert_array_equal(again.sample(data[:3], 50, seed=1), draws)
    assert (fitted.sample(data[:3], 50, seed=2) != draws).any()
