"""Ridge regression on textbook statistics of the same samples: the baseline for a network.

The features are the log power spectrum and the histogram of counts at each redshift; the outputs
are the four parameters. The penalty is chosen by cross-validation within the training split.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
_PENALTIES: Array = np.logspace(-4, 4, 17)
"""Ridge penalties to try, in units of the mean eigenvalue of the features' covariance."""
_BIN_EDGES = (0, 1, 2, 3, 4, 6, 9, 13, 20, 32, 64, 2**15)
"""Bin edges of the histogram of counts; a bin excludes its upper edge."""


def fit_ridge(train: Reader, validation: Reader) -> Evaluation:
    """Fit the regression to the split of `train` and evaluate it on that of `validation`.

    Reads every sample of both once.

    Raises:
        DataError: A sample cannot be read and may not be skipped.
    """
    _, features, targets = read_features(train)
    index, held_out, truth = read_features(validation)
    penalty = _choose_penalty(features, targets)
    return Evaluation(index, _predict(features, targets, held_out, np.array([penalty]))[0], truth)


def read_features(reader: Reader) -> tuple[npt.NDArray[np.int64], Array, Array]:
    """Return the indices of the samples of `reader`, (n,), their features, (n, f), and targets, (n, 4)."""

    def one(index: int) -> tuple[int, Array, npt.NDArray[np.float32]] | None:
        sample = reader.sample(index)
        return None if sample is None else (index, compute_features(sample.counts), sample.target)

    with ThreadPoolExecutor(available_cores()) as pool:
        rows = [row for row in pool.map(one, range(len(reader.split))) if row is not None]
    index, features, targets = zip(*rows, strict=True)
    return np.array(index), np.stack(features), np.stack(targets).astype(np.float64)


def compute_features(counts: npt.NDArray[np.int16]) -> Array:
    """Return log power in shells of wave number and log fractions of count bins for `counts` (D, H, W, C).

    Shells are one fundamental mode wide, from 1 to the Nyquist frequency. The power includes the shot
    noise of the particles, as do the inputs of a network.

    Returns:
        Features, (f,): first the spectra, then the histograms, each by redshift.
    """
    size, channels = counts.shape[0], counts.shape[-1]
    fields = torch.from_numpy(np.moveaxis(counts, -1, 0).astype(np.float32))
    modes = torch.fft.rfftn(fields, dim=(1, 2, 3))
    square = (modes.real**2 + modes.imag**2).reshape(channels, -1).double()
    shells, modes_in_shell = _shells(size)
    power = torch.zeros(channels, len(modes_in_shell), dtype=torch.float64).index_add_(1, shells, square)
    power = (power / modes_in_shell)[:, 1 : size // 2 + 1]
    # An empty or uniform field has no power; a floor keeps its logarithm finite.
    spectrum = torch.log(power.clamp(min=1e-6)).numpy()
    bins = np.searchsorted(_BIN_EDGES, counts, side="right")
    shares = np.stack(
        [np.bincount(bins[..., c].ravel(), minlength=len(_BIN_EDGES) + 1) for c in range(channels)]
    )
    # Add 1 to each bin, so that an empty one has a finite logarithm.
    histogram = np.log((shares[:, 1:-1] + 1.0) / size**3)
    return np.concatenate([spectrum.ravel(), histogram.ravel()])


@lru_cache(maxsize=1)
def _shells(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shell of each mode of an rfftn, flattened, and the number of modes in each shell."""
    full, half = torch.fft.fftfreq(size, 1 / size), torch.arange(size // 2 + 1, dtype=torch.float32)
    radius = torch.sqrt(
        full.reshape(-1, 1, 1) ** 2 + full.reshape(1, -1, 1) ** 2 + half.reshape(1, 1, -1) ** 2
    )
    shells = radius.round().long().flatten()
    return shells, torch.bincount(shells).double()


def _predict(features: Array, targets: Array, held_out: Array, penalties: Array) -> Array:
    """Fit `targets` (n, 4) to `features` (n, f) with each of the penalties (p,), from one eigendecomposition.

    Returns:
        Predictions for the features `held_out` (m, f), as (p, m, 4).
    """
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1.0
    standard = (features - mean) / scale
    centre = targets.mean(axis=0)
    values, vectors = np.linalg.eigh(standard.T @ standard / len(standard))
    projected = vectors.T @ (standard.T @ (targets - centre) / len(standard))
    weights = vectors @ (projected / (values + penalties[:, None])[:, :, None])
    return (held_out - mean) / scale @ weights + centre


def _choose_penalty(features: Array, targets: Array) -> float:
    """Return the penalty with the least mean absolute error in cross-validation.

    Folds are contiguous, so that the crops of a universe, which are consecutive, share a fold.
    """
    errors, indices = np.zeros(len(_PENALTIES)), np.arange(len(features))
    for fold in np.array_split(indices, min(_FOLDS, len(features))):
        rest = np.setdiff1d(indices, fold)
        predicted = _predict(features[rest], targets[rest], features[fold], _PENALTIES)
        errors += np.abs(predicted - targets[fold]).sum(axis=(1, 2))
    return float(_PENALTIES[errors.argmin()])
