"""Division of the training samples between the network and the fit of its posteriors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cosmoflow_dali.posterior.fitted import number_universes
from pipelines.errors import ConfigError, check_field
from pipelines.plan import derive_seed

Indices = npt.NDArray[np.int64]

LEAST_UNIVERSES = 50
"""Universes that a fit or a test needs to mean something."""


@dataclass(frozen=True, slots=True)
class PosteriorConfig:
    """Settings of the posteriors that are fitted after training.

    Args:
        calibration: Fraction of the training universes that the network does not see, for the fit.
        max_samples: Most samples of the fit that the network sees, and most that it does not see.
    """

    calibration: float = 0.5
    max_samples: int = 16384

    def __post_init__(self) -> None:
        valid = 0 < self.calibration < 1
        check_field(self, "calibration", valid, "must be above 0 and below 1")
        valid = self.max_samples >= LEAST_UNIVERSES
        check_field(self, "max_samples", valid, f"must be at least {LEAST_UNIVERSES}")


def hold_out(config: PosteriorConfig, sample_ids: Sequence[str], seed: int) -> tuple[Indices, Indices]:
    """Return the indices of the samples to train on, and of those for the fit, in order.

    The latter are all samples of universes drawn by `seed`: the fraction `config.calibration`, or less where
    that is more than `config.max_samples` samples.

    Raises:
        ConfigError: There are too few universes.
    """
    universes = number_universes(sample_ids)
    order = np.random.default_rng(derive_seed(seed, "calibration")).permutation(universes.max() + 1)
    most = int(np.searchsorted(np.bincount(universes)[order].cumsum(), config.max_samples, "right"))
    count = min(round(config.calibration * len(order)), most)
    if min(count, len(order) - count) < LEAST_UNIVERSES:
        advice = (
            f"of {len(order)} universes this leaves {count} for the fit and {len(order) - count} for "
            f"training; each needs {LEAST_UNIVERSES}: give more samples, or leave `posterior` out"
        )
        if count == most < LEAST_UNIVERSES:
            advice = f"holds {count} universes, and the fit needs {LEAST_UNIVERSES}; raise it"
            raise ConfigError("posterior.max_samples", config.max_samples, advice)
        raise ConfigError("posterior.calibration", config.calibration, advice)
    held_out = np.isin(universes, order[:count])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
