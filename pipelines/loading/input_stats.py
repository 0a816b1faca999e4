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
    """Mean and standard deviation of each redshift's input, (4,) float32 each, over some samples."""
    split, samples = reader.split, 0
    count = min(len(split), _STATISTICS_SAMPLES)
    # Evenly spread, for neighbours in file order may share a universe.
    chosen = np.linspace(0, len(split) - 1, count).astype(int)
    moments = np.zeros((2, split.spec.channels))
    for index in chosen.tolist():
        sample = reader.sample(index)
        if sample is None:
            continue
        samples += 1
        values = transform(sample.counts, apply_log=apply_log).astype(np.float64)
        moments += [values.mean(axis=(0, 1, 2)), np.square(values).mean(axis=(0, 1, 2))]
    if not samples:
        raise DataError(split.root, f"{count} samples looked at are all damaged", "see preprocess.verify")
    mean, square = moments / samples
    return mean.astype(np.float32), np.sqrt(square - mean**2).clip(1e-6).astype(np.float32)
