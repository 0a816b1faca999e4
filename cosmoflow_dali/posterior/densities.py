"""Posteriors that need no network: the prior itself, and a Gaussian of constant width."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Posterior(Protocol):
    """A distribution of targets for each universe, given its features."""

    def log_density(self, features: Array, targets: Array) -> Array:
        """Return the log-density of `targets` (n, p) given `features` (n, f), (n,), in nats per unit of u."""

    def sample(self, features: Array, draws: int, seed: int) -> Array:
        """Return targets drawn from the posterior given `features` (n, f), (n, draws, p)."""


class UniformPrior:
    """The uniform distribution of `targets` parameters over [-1, 1], whatever the features."""

    def __init__(self, targets: int) -> None:
        self._targets = targets

    def log_density(self, features: Array, targets: Array) -> Array:
        """Return the log-density of `targets` (n, p), (n,)."""
        return np.full(len(features), -self._targets * math.log(2))

    def sample(self, features: Array, draws: int, seed: int) -> Array:
        """Return draws (n, draws, p), with n the number of rows of `features`."""
        return np.random.default_rng(seed).uniform(-1, 1, (len(features), draws, self._targets))


class ResidualGaussian:
    """A Gaussian around the features, which are predictions, with the covariance of their residuals.

    It is not cut at the prior's box.

    Args:
        covariance: Mean of the products of residuals, prediction less target, (p, p), of samples that the
            predictions were not fitted to.
    """

    def __init__(self, covariance: Array) -> None:
        self.covariance = covariance
        self._factor = np.linalg.cholesky(covariance)

    def log_density(self, features: Array, targets: Array) -> Array:
        """Return the log-density of `targets` (n, p) given predictions `features` (n, p), (n,)."""
        white = np.linalg.solve(self._factor, (targets - features).T)
        constant = np.log(np.diag(self._factor)).sum() + len(white) * math.log(2 * math.pi) / 2
        return -np.square(white).sum(axis=0) / 2 - constant

    def sample(self, features: Array, draws: int, seed: int) -> Array:
        """Return draws (n, draws, p) around predictions `features` (n, p)."""
        noise = np.random.default_rng(seed).standard_normal((len(features), draws, features.shape[1]))
        return features[:, None] + noise @ self._factor.T
