"""Ridge regression on textbook statistics of the same samples: the baseline for a network.

The statistics are the log power spectrum and the histogram of counts at each redshift; the outputs
are the four parameters. `cosmoflow_dali.baseline` compares this with a stronger baseline.
"""

from __future__ import annotations

import numpy as np

from cosmoflow_dali.posterior import ridge
from cosmoflow_dali.posterior.summaries import num_basic_summaries
from cosmoflow_dali.reporting.read_features import read_features
from cosmoflow_dali.training.evaluation import Evaluation
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.loading.reader import Reader

NAME = "ridge regression on log P(k) and the histogram of counts"


def fit_ridge(train: Reader, validation: Reader) -> Evaluation:
    """Fit the regression to the split of `train` and evaluate it on that of `validation`.

    Reads every sample of both once, on this rank alone.

    Raises:
        DataError: A sample cannot be read and may not be skipped, or none is left.
    """
    session, basic = Session(World()), num_basic_summaries(train.split.spec)
    fitted, scored = (read_features(reader, None, session) for reader in (train, validation))
    assert fitted is not None and scored is not None
    regression, _ = ridge.fit_ridge(fitted.summaries[:, :basic], fitted.targets, fitted.universes)
    predictions = regression.predict(scored.summaries[:, :basic])
    return Evaluation(np.arange(len(scored)), predictions, scored.targets)
