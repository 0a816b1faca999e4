"""Ridge regression on textbook statistics of the same samples: the baseline for a network.

The statistics are the log power spectrum and the histogram of counts at each redshift; the outputs
are the four parameters. `cosmoflow_dali.baseline` compares this with a stronger baseline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cosmoflow_dali.posterior import ridge
from cosmoflow_dali.posterior.summaries import compute_basic_summaries
from cosmoflow_dali.training.evaluation import Evaluation
from pipelines.distributed.world import available_cores
from pipelines.errors import DataError
from pipelines.loading.reader import Reader

Array = npt.NDArray[np.float64]

NAME = "ridge regression on log P(k) and the histogram of counts"

_CROP = re.compile(r"_\d{3,}$")


@dataclass(frozen=True, slots=True)
class SummarizedSplit:
    """Summaries of the samples of a split, without those that were skipped.

    Attributes:
        index: Position of each sample in the split, (n,).
        summaries: (n, f).
        targets: (n, 4).
        universes: Number of each sample's universe, (n,).
    """

    index: npt.NDArray[np.int64]
    summaries: Array
    targets: Array
    universes: npt.NDArray[np.int64]


def fit_ridge(train: Reader, validation: Reader) -> Evaluation:
    """Fit the regression to the split of `train` and evaluate it on that of `validation`.

    Reads every sample of both once.

    Raises:
        DataError: A sample cannot be read and may not be skipped, or none is left.
    """
    fitted, scored = (summarize_split(reader, compute_basic_summaries) for reader in (train, validation))
    regression, _ = ridge.fit_ridge(fitted.summaries, fitted.targets, fitted.universes)
    return Evaluation(scored.index, regression.predict(scored.summaries), scored.targets)


def summarize_split(reader: Reader, compute: Callable[[npt.NDArray[np.int16]], Array]) -> SummarizedSplit:
    """Return the summaries that `compute` makes of the counts (1, n, n, n, C) of each sample of `reader`.

    Raises:
        DataError: A sample cannot be read and may not be skipped, or none is left.
    """
    split = reader.split

    def one(index: int) -> tuple[int, Array, npt.NDArray[np.float32]] | None:
        sample = reader.sample(index)
        return None if sample is None else (index, compute(sample.counts[None])[0], sample.target)

    with ThreadPoolExecutor(available_cores()) as pool:
        rows = [row for row in pool.map(one, range(len(split))) if row is not None]
    if not rows:
        raise DataError(split.root, "has no valid sample", "see preprocess.verify")
    index, summaries, targets = (np.array(column) for column in zip(*rows, strict=True))
    universes = number_universes(split.sample_id(at) for at in index)
    return SummarizedSplit(index, summaries, targets.astype(np.float64), universes)


def number_universes(sample_ids: Iterable[str]) -> npt.NDArray[np.int64]:
    """Return the number of each sample's universe: of `<universe>_<crop>`, as in the published set.

    If that is one universe, the names mean something else: each sample then counts as a universe of its own.
    """
    ids = list(sample_ids)
    names, numbers = np.unique([_CROP.sub("", name) for name in ids], return_inverse=True)
    return numbers if len(names) > 1 else np.arange(len(ids))
