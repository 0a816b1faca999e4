"""Scores of a posterior on universes that it was not fitted to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cosmoflow_dali.posterior.calibration import LEVELS, Calibration, Ranks, calibrate, rank_truths
from cosmoflow_dali.posterior.densities import Posterior
from pipelines.sample import PARAMETERS

Array = npt.NDArray[np.float64]

DRAWS = 399
"""Draws for each universe. Their mean adds 1/800 to the error of the posterior mean, at most."""

_UNIVERSES_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class PosteriorScores:
    """Scores of one posterior, in units of the target.

    Attributes:
        targets: True parameters, (n, p).
        means: Means of the posteriors, (n, p).
        deviations: Their standard deviations, (n, p).
        log_densities: Log-densities of the truths, (n,), in nats.
        ranks: Positions of the truths among the draws.
        calibration: The tests' results.
    """

    targets: Array
    means: Array
    deviations: Array
    log_densities: Array
    ranks: Ranks
    calibration: Calibration

    @property
    def mae(self) -> Array:
        """Mean absolute error of the posterior mean for each parameter, (p,)."""
        return np.abs(self.means - self.targets).mean(axis=0)

    @property
    def nll(self) -> float:
        """Mean negative log-density of the truth, in nats."""
        return -float(self.log_densities.mean())

    @property
    def nll_error(self) -> float:
        """Standard error of `nll`."""
        return float(self.log_densities.std() / np.sqrt(self.calibration.universes))

    @property
    def bias(self) -> Array:
        """Mean of (posterior mean - truth) / standard deviation for each parameter, (p,)."""
        return ((self.means - self.targets) / self.deviations).mean(axis=0)

    @property
    def bias_error(self) -> Array:
        """Standard error of `bias` for each parameter, (p,)."""
        pulls = (self.means - self.targets) / self.deviations
        return pulls.std(axis=0) / np.sqrt(self.calibration.universes)

    def nll_difference(self, other: PosteriorScores) -> tuple[float, float]:
        """Return `nll` less that of `other` for the same samples, and its standard error, in nats."""
        differences = other.log_densities - self.log_densities
        return float(differences.mean()), float(differences.std() / np.sqrt(self.calibration.universes))

    def to_json(self) -> dict[str, object]:
        """Return the scores for programs."""
        names, tests = [parameter.name for parameter in PARAMETERS], self.calibration
        return {
            "mae": float(self.mae.mean()),
            "mae_per_parameter": dict(zip(names, self.mae.tolist(), strict=True)),
            "nll": self.nll,
            "nll_standard_error": self.nll_error,
            "bias": dict(zip(names, self.bias.tolist(), strict=True)),
            "bias_standard_error": dict(zip(names, self.bias_error.tolist(), strict=True)),
            "coverage": {
                f"{level:.0%}": {"limit": limit, **dict(zip(names, row, strict=True))}
                for level, limit, row in zip(
                    LEVELS, tests.coverage_limits.tolist(), tests.coverage.tolist(), strict=True
                )
            },
            "sbc_ks_p": dict(zip(names, tests.ks_p.tolist(), strict=True)),
            "tarp_area": {"limit": tests.tarp_limit, "area": tests.tarp_area},
            "calibrated": not tests.failures,
            "verdict": tests.verdict,
        }


def score_posterior(
    posterior: Posterior, features: Array, targets: Array, references: Array, universes: int, seed: int
) -> PosteriorScores:
    """Score `posterior` given `features` (n, f) against `targets` (n, p).

    Args:
        references: Reference points of TARP, (n, p), which must not depend on the targets.
        universes: Number of independent universes among the samples.
        seed: Seed of the draws.
    """
    means, deviations, below, nearer = [], [], [], []
    for start in range(0, len(targets), _UNIVERSES_AT_ONCE):
        rows = slice(start, start + _UNIVERSES_AT_ONCE)
        draws = posterior.sample(features[rows], DRAWS, seed + start)
        ranks = rank_truths(draws, targets[rows], references[rows])
        means.append(draws.mean(axis=1))
        deviations.append(draws.std(axis=1))
        below.append(ranks.below)
        nearer.append(ranks.nearer)
    ranks = Ranks(np.concatenate(below), np.concatenate(nearer), ranks.step)
    names = [parameter.name for parameter in PARAMETERS]
    return PosteriorScores(
        targets,
        np.concatenate(means),
        np.concatenate(deviations),
        posterior.log_density(features, targets),
        ranks,
        calibrate(ranks, names, universes),
    )
