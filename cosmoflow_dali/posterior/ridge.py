"""Ridge regression of the parameters on summaries: their compression to one number a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]
Universes = npt.NDArray[np.int64]

_FOLDS = 5
_PENALTIES: Array = np.logspace(-5, 4, 28)
"""Penalties to try, in units of the variance of a standardized summary."""


@dataclass(frozen=True, slots=True)
class Ridge:
    """A fitted regression.

    Attributes:
        mean: Means of the summaries, (f,).
        weights: Weights of the summaries less their means, (f, p).
        intercept: Means of the targets, (p,).
    """

    mean: Array
    weights: Array
    intercept: Array

    def predict(self, summaries: Array) -> Array:
        """Return predictions (n, p) for `summaries` (n, f)."""
        return (summaries - self.mean) @ self.weights + self.intercept

    def state(self) -> dict[str, torch.Tensor]:
        """Return the regression as tensors, for `from_state`."""
        return {name: torch.from_numpy(getattr(self, name)) for name in self.__slots__}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Ridge:
        """Return the regression whose `state` this is."""
        return Ridge(**{name: tensor.numpy() for name, tensor in state.items()})


def fit_ridge(summaries: Array, targets: Array, universes: Universes) -> tuple[Ridge, Array]:
    """Fit `targets` (n, p) to `summaries` (n, f), with the penalty of each target chosen by cross-validation.

    Args:
        universes: Universe of each sample, (n,). Samples of one universe share a fold.

    Returns:
        The regression on all samples, and predictions (n, p) of each sample by a regression on the other
        folds. What is fitted on predictions needs the latter: those of a fit's own samples are too good.
    """
    every = np.repeat(_PENALTIES[:, None], targets.shape[1], axis=1)
    predictions = np.empty((len(every), *targets.shape))
    folds = split_universes(universes, _FOLDS)
    for fold in folds:
        rest = np.ones(len(targets), dtype=bool)
        # A single universe can only predict itself.
        rest[fold] = len(folds) == 1
        for at, ridge in enumerate(_fit(summaries[rest], targets[rest], every)):
            predictions[at, fold] = ridge.predict(summaries[fold])
    best = np.square(predictions - targets).mean(axis=1).argmin(axis=0)
    (ridge,) = _fit(summaries, targets, _PENALTIES[None, best])
    return ridge, np.take_along_axis(predictions, best[None, None], axis=0)[0]


def split_universes(universes: Universes, parts: int) -> list[npt.NDArray[np.int64]]:
    """Return the indices of the samples in each of up to `parts` equal parts of the universes, in order."""
    known, code = np.unique(universes, return_inverse=True)
    parts = min(parts, len(known))
    part_of = np.arange(len(known)) * parts // len(known)
    return [np.flatnonzero(part_of[code] == part) for part in range(parts)]


def _fit(summaries: Array, targets: Array, penalties: Array) -> list[Ridge]:
    """Fit with each of `penalties` (m, p), which has one for each target, from one eigendecomposition."""
    mean, scale, centre = summaries.mean(axis=0), summaries.std(axis=0), targets.mean(axis=0)
    # A constant summary, such as a bin that is always empty, gets no weight.
    scale[scale <= 1e-9 * np.abs(mean)] = np.inf
    standard = (summaries - mean) / scale
    values, vectors = np.linalg.eigh(standard.T @ standard / len(standard))
    projected = vectors.T @ (standard.T @ (targets - centre) / len(standard))
    return [
        Ridge(mean, vectors @ (projected / (values[:, None] + penalty)) / scale[:, None], centre)
        for penalty in penalties
    ]
