"""What textbook statistics say about the same universes: the score a network has to beat.

A ridge regression from the log power spectrum and the histogram of counts, both at each redshift,
to the four parameters. Its penalty is chosen by cross-validation within the training split.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from cosmoflow_dali.training.evaluation import Evaluation
from pipelines.distributed.world import available_cores
from pipelines.loading.reader import Reader

Array = npt.NDArray[np.float64]

NAME = "ridge regression on log P(k) and the histogram of counts"
_FOLDS = 5
_PENALTIES = np.logspace(-4, 4, 17)
"""In units of the mean eigenvalue of the features' covariance."""
_BIN_EDGES = (0, 1, 2, 3, 4, 6, 9, 13, 20, 32, 64, 2**15)
"""Counts from one edge to below the next share a bin of the histogram."""


@dataclass(frozen=True, slots=True)
class Ridge:
    """A linear map from standardised features to targets."""

    mean: Array
    scale: Array
    weights: Array
    intercept: Array

    def predict(self, features: Array) -> Array:
        """Targets (n, 4) of `features` (n, f)."""
        return (features - self.mean) / self.scale @ self.weights + self.intercept


def fit_ridge(train: Reader, validation: Reader) -> Evaluation:
    """The regression's answers over the split of `validation` after fitting it to that of `train`.

    Reads every sample of both once. DataError names one that cannot be read or passed over.
    """
    _, features, targets = statistics_of(train)
    penalty = _choose_penalty(features, targets)
    ridge = _fit(features, targets, [penalty])[0]
    index, features, targets = statistics_of(validation)
    return Evaluation(index, ridge.predict(features), targets)


def statistics_of(reader: Reader) -> tuple[npt.NDArray[np.int64], Array, Array]:
    """Which samples `reader` gives of its split, in order, their features (n, f) and targets (n, 4)."""

    def one(index: int) -> tuple[int, Array, npt.NDArray[np.float32]] | None:
        sample = reader.sample(index)
        return None if sample is None else (index, features_of(sample.counts), sample.target)

    with ThreadPoolExecutor(available_cores()) as pool:
        rows = [row for row in pool.map(one, range(len(reader.split))) if row is not None]
    index, features, targets = zip(*rows, strict=True)
    return np.array(index), np.stack(features), np.stack(targets).astype(np.float64)


def features_of(counts: npt.NDArray[np.int16]) -> Array:
    """Log power in shells of wave number and log shares of count bins, by redshift, for (D, H, W, C).

    Shells are one fundamental mode wide, from 1 to the Nyquist frequency; the shot noise of the
    particles is part of the power, as it is part of what a network sees.
    """
    size, channels = counts.shape[0], counts.shape[-1]
    fields = torch.from_numpy(np.moveaxis(counts, -1, 0).astype(np.float32))
    modes = torch.fft.rfftn(fields, dim=(1, 2, 3))
    square = (modes.real**2 + modes.imag**2).reshape(channels, -1).double()
    shells, modes_in_shell = _shells(size)
    power = torch.zeros(channels, len(modes_in_shell), dtype=torch.float64)
    power.index_add_(1, shells, square)
    power = (power / modes_in_shell)[:, 1 : size // 2 + 1]
    # A field that is empty or uniform has no power; a floor keeps its logarithm a number.
    spectrum = torch.log(power.clamp(min=1e-6)).numpy()
    bins = np.searchsorted(_BIN_EDGES, counts, side="right")
    shares = np.stack(
        [np.bincount(bins[..., c].ravel(), minlength=len(_BIN_EDGES) + 1) for c in range(channels)]
    )
    # One more in each bin, so that an empty one has a logarithm.
    histogram = np.log((shares[:, 1:-1] + 1.0) / size**3)
    return np.concatenate([spectrum.ravel(), histogram.ravel()])


@lru_cache(maxsize=1)
def _shells(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The shell of each mode of an rfftn, flattened, and the number of modes in each shell."""
    full, half = torch.fft.fftfreq(size, 1 / size), torch.arange(size // 2 + 1, dtype=torch.float32)
    radius = torch.sqrt(
        full.reshape(-1, 1, 1) ** 2 + full.reshape(1, -1, 1) ** 2 + half.reshape(1, 1, -1) ** 2
    )
    shells = radius.round().long().flatten()
    return shells, torch.bincount(shells).double()


def _fit(features: Array, targets: Array, penalties: list[float]) -> list[Ridge]:
    """The regression for each of `penalties`, by one eigendecomposition."""
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    standard = (features - mean) / scale
    centre = targets.mean(axis=0)
    values, vectors = np.linalg.eigh(standard.T @ standard / len(standard))
    projected = vectors.T @ (standard.T @ (targets - centre) / len(standard))
    return [
        Ridge(mean, scale, vectors @ (projected / (values + penalty)[:, None]), centre)
        for penalty in penalties
    ]


def _choose_penalty(features: Array, targets: Array) -> float:
    """The penalty with the least mean absolute error over folds that are left out in turn.

    Folds are stretches of the split's order, so that crops of one universe, which stand side by
    side in it, do not fall into different ones.
    """
    errors = np.zeros(len(_PENALTIES))
    penalties = [float(penalty) for penalty in _PENALTIES]
    folds = np.array_split(np.arange(len(features)), min(_FOLDS, len(features)))
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(features)), fold)
        for at, ridge in enumerate(_fit(features[rest], targets[rest], penalties)):
            errors[at] += np.abs(ridge.predict(features[fold]) - targets[fold]).sum()
    return penalties[int(errors.argmin())]
