"""Mean and standard deviation of the network's input, for networks that standardise it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.loading.reader import Reader
from pipelines.loading.transforms import transform

_STATISTICS_SAMPLES = 128


def input_statistics(
    reader: Reader, *, apply_log: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return mean and standard deviation of each redshift's input, (4,) float32 each, over up to 128 samples.

    Raises:
        DataError: None of these samples can be used.
    """
    split = reader.split
    count = min(len(split), _STATISTICS_SAMPLES)
    moments = []
    # Evenly spaced, because neighbours in file order may be of one universe.
    for index in np.linspace(0, len(split) - 1, count).astype(int).tolist():
        sample = reader.sample(index)
        if sample is not None:
            counts = sample.counts
            # The mean of counts is that of the whole sample.
            planes = map(_logarithms, counts) if apply_log else transform(counts, apply_log=False)
            moments.append(np.mean([_moments(plane) for plane in planes], axis=0))
    if not moments:
        first = next(iter(reader.skipped.values()))
        raise DataError(split.root, f"none of the {count} samples read can be used", f"the first: {first}")
    mean, square = np.mean(moments, axis=0)
    # Rounding may make the variance of constant input negative; such input is only shifted.
    variance = square - mean**2
    deviation = np.sqrt(np.where(variance > 1e-12, variance, 1.0))
    return mean.astype(np.float32), deviation.astype(np.float32)


def _logarithms(counts: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    return transform(counts, apply_log=True)


def _moments(plane: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the mean and the mean square of each redshift of (H, W, C), (2, C).

    In double precision a whole sample of 512^3 would take four gigabytes, twice.
    """
    values = plane.astype(np.float64)
    return np.stack([values.mean(axis=(0, 1)), np.square(values).mean(axis=(0, 1))])
