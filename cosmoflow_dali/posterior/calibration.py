"""Tests of the calibration of posteriors, which a posterior can fail.

- **Coverage.** The central interval that holds 68% (95%) of a posterior should hold the truth in 68% (95%)
  of the universes.
- **Simulation-based calibration** (Talts et al. 2018, arXiv:1804.06788). The rank of the truth among the
  draws is uniform; a Kolmogorov-Smirnov test compares it with the uniform distribution.
- **TARP** (Lemos et al. 2023, arXiv:2302.03026). The fraction of the draws that are nearer to a reference
  point than the truth is uniform, if the point depends on nothing but the data. The points are estimates
  from the same data: a posterior that ignores the data, such as the prior, fails, and passes the other tests.

Limits are three standard deviations of a perfect posterior for the given number of universes, so a
perfect posterior with four parameters fails one of the 13 tests in about 3% of all cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEVELS = (0.68, 0.95)
_SIGMAS = 3.0
_LEAST_P = math.erfc(_SIGMAS / math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Ranks:
    """Positions of the truth among the draws of each posterior.

    Attributes:
        below: Fraction of the draws below the truth for each parameter, (n, p). A fraction is
            (rank + 1/2) / (draws + 1), which is never 0 or 1.
        nearer: Fraction of the draws that are nearer to the reference point than the truth, (n,).
        step: 1 / (draws + 1), the distance between neighbouring fractions.
    """

    below: Array
    nearer: Array
    step: float


def rank_truths(draws: Array, truths: Array, references: Array) -> Ranks:
    """Rank `truths` (n, p) among `draws` (n, d, p); `references` (n, p) must not depend on the truths.

    d is best one less than a multiple of 100: intervals of 68% and 95% then hold a whole number of ranks.
    """
    step = 1 / (draws.shape[1] + 1)
    below = (draws < truths[:, None]).sum(axis=1)
    distances = np.square(draws - references[:, None]).sum(axis=2)
    nearer = (distances < np.square(truths - references).sum(axis=1)[:, None]).sum(axis=1)
    return Ranks((below + 0.5) * step, (nearer + 0.5) * step, step)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Results of all tests.

    Attributes:
        universes: Number of independent universes, which sets the limits.
        coverage: Fraction of truths in the central interval of each level of `LEVELS`, (levels, p).
        coverage_limits: Largest deviation from the level, (levels,).
        ks_p: p-value of the ranks of each parameter, (p,); at least `_LEAST_P`.
        tarp_area: Area between TARP's expected coverage and the diagonal, positive for a posterior that is
            too wide around the reference points.
        tarp_limit: Largest magnitude of the area.
        failures: One phrase for each failed test.
    """

    universes: int
    coverage: Array
    coverage_limits: Array
    ks_p: Array
    tarp_area: float
    tarp_limit: float
    failures: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.failures:
            return f"not calibrated: {'; '.join(self.failures)}"
        return f"calibrated, as far as {self.universes} universes can tell"


def calibrate(ranks: Ranks, names: Sequence[str], universes: int) -> Calibration:
    """Test `ranks` for uniformity.

    Args:
        names: Name of each parameter, for failures.
        universes: Number of independent universes; less than the number of samples if these are crops.
    """
    levels = np.array(LEVELS)
    coverage = (np.abs(ranks.below - 0.5) < levels[:, None, None] / 2).mean(axis=1)
    coverage_limits = _SIGMAS * np.sqrt(levels * (1 - levels) / universes)
    # Spread over the whole step, discrete ranks of a perfect posterior are exactly uniform.
    spread = np.random.default_rng(0).uniform(-0.5, 0.5, ranks.below.shape) * ranks.step
    ks_p = np.array([uniform_p(column, universes) for column in (ranks.below + spread).T])
    tarp_area, tarp_limit = 0.5 - float(ranks.nearer.mean()), _SIGMAS / math.sqrt(12 * universes)
    failures = [
        f"{level:.0%} intervals of {name} hold {share:.1%} of the truths (limits {level:.0%} ± {limit:.1%})"
        for level, limit, row in zip(LEVELS, coverage_limits, coverage, strict=True)
        for name, share in zip(names, row, strict=True)
        if abs(share - level) > limit
    ]
    failures += [
        f"ranks of {name} are not uniform (p = {p:.1g}, limit {_LEAST_P:.1g})"
        for name, p in zip(names, ks_p, strict=True)
        if p < _LEAST_P
    ]
    if abs(tarp_area) > tarp_limit:
        failures.append(f"TARP's area is {tarp_area:+.3f} (limits ± {tarp_limit:.3f})")
    return Calibration(universes, coverage, coverage_limits, ks_p, tarp_area, tarp_limit, tuple(failures))


def uniform_p(values: Array, count: int) -> float:
    """Return the p-value of the Kolmogorov-Smirnov test of `values` (n,) against the uniform on [0, 1].

    Uses Kolmogorov's distribution with the correction of Stephens 1970 for a finite sample.

    Args:
        count: Number of independent values.
    """
    ordered, n = np.sort(values), len(values)
    distance = max(
        float((np.arange(1, n + 1) / n - ordered).max()), float((ordered - np.arange(n) / n).max())
    )
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    if scaled < 0.2:
        # The series converges slowly there; the p-value is 1 to 12 digits.
        return 1.0
    terms = [(-1) ** (j - 1) * math.exp(-2 * (j * scaled) ** 2) for j in range(1, 101)]
    return min(1.0, max(0.0, 2 * sum(terms)))
