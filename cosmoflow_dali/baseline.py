"""Score posteriors from plain statistics: `python -m cosmoflow_dali.baseline DATA`.

Fits to DATA/train, and scores on DATA/test, or on DATA/validation if there is no test: the prior; a ridge
regression on power spectrum and histogram with Gaussian errors; and a normalizing flow on a ridge
regression of power spectra, histogram, counts in cells and moments across redshifts. Prints their mean
absolute error, negative log-likelihood, coverage and calibration, in units of the target. No network is
needed; a network should do better.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.posterior.calibration import LEVELS
from cosmoflow_dali.posterior.densities import Posterior, ResidualGaussian, UniformPrior
from cosmoflow_dali.posterior.flow import fit_flow
from cosmoflow_dali.posterior.ridge import fit_ridge
from cosmoflow_dali.posterior.scores import PosteriorScores, score_posterior
from cosmoflow_dali.posterior.summaries import compute_summaries, num_basic_summaries
from cosmoflow_dali.reporting.ridge_baseline import SummarizedSplit, summarize_split
from pipelines.console import print_line
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World
from pipelines.errors import DataError
from pipelines.filesystem import is_present, refuse_input
from pipelines.loading.reader import Reader
from pipelines.output import write_output
from pipelines.sample import PARAMETERS, is_in_range
from pipelines.tables import format_table

_LEAST_UNIVERSES = 50
"""Universes that a split needs, for the fit to have a meaning and the calibration a power."""

_TITLES = {"prior": "prior", "ridge": "ridge, Gaussian", "flow": "summaries, flow"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    world = World()
    with report_errors(world):
        parser = OneLineParser("cosmoflow_dali.baseline", __doc__)
        parser.add_argument(
            "data", type=Path, metavar="DATA", help="data set with train/ and test/ or validation/"
        )
        parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for all scores")
        parser.add_argument(
            "--seed", type=int, default=0, help="seed of the fit and of the draws, at least 0"
        )
        arguments = parser.parse_args(argv)
        if arguments.seed < 0:
            parser.error(f"--seed {arguments.seed}: must be at least 0")
        # Samples are summarized side by side, and the flows are too small to share among cores.
        configure_torch(torch.device("cpu"), 1)
        start, root = time.perf_counter(), arguments.data
        scored_name = "test" if is_present(root / "test") else "validation"
        datasets = [open_folder(root / name) for name in ("train", scored_name)]
        if datasets[0].spec != datasets[1].spec:
            fault = f"holds samples of shape {datasets[1].spec.shape}, and train/ of {datasets[0].spec.shape}"
            raise DataError(datasets[1].root, fault, "use splits of one data set")
        if arguments.output is not None:
            refuse_input(arguments.output, [path for dataset in datasets for path in dataset.all_files()])
        train, scored = (_summarize(dataset) for dataset in datasets)
        universes = len(np.unique(scored.universes))
        scores = _score(train, scored, num_basic_summaries(datasets[0].spec), universes, arguments.seed)
        result = {
            "data": str(root),
            "split": scored_name,
            "train_samples": len(train.index),
            "samples": len(scored.index),
            "universes": universes,
            "summaries": train.summaries.shape[1],
            "seed": arguments.seed,
            "seconds": time.perf_counter() - start,
            "scores": {name: each.to_json() for name, each in scores.items()},
        }
        if arguments.output is not None:
            write_output(
                arguments.output, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode())
            )
        for line in _format(scores):
            print_line(line)
    return 0


def _summarize(dataset: SampleDataset) -> SummarizedSplit:
    """Return the summaries of all samples; DataError if the targets or the number of universes do not do."""
    split = summarize_split(Reader(dataset), compute_summaries)
    if (universes := len(np.unique(split.universes))) < _LEAST_UNIVERSES:
        raise DataError(dataset.root, f"holds {universes} universes", f"expected at least {_LEAST_UNIVERSES}")
    for index, target in zip(split.index, split.targets, strict=True):
        if not is_in_range(target.astype(np.float32)):
            fault = f"the target {target.tolist()} is outside of the prior, -1 to 1"
            raise DataError(dataset.path(index), fault, "see preprocess.verify")
    return split


def _score(
    train: SummarizedSplit, scored: SummarizedSplit, basic: int, universes: int, seed: int
) -> dict[str, PosteriorScores]:
    """Fit each posterior to `train` and return its scores; the ridge has the first `basic` summaries."""
    simple, simple_held_out = fit_ridge(train.summaries[:, :basic], train.targets, train.universes)
    full, full_held_out = fit_ridge(train.summaries, train.targets, train.universes)
    estimates = full.predict(scored.summaries)
    posteriors: dict[str, tuple[Posterior, npt.NDArray[np.float64]]] = {
        "prior": (UniformPrior(len(PARAMETERS)), estimates),
        "ridge": (
            ResidualGaussian(simple_held_out - train.targets),
            simple.predict(scored.summaries[:, :basic]),
        ),
        "flow": (fit_flow(full_held_out, train.targets, train.universes, seed), estimates),
    }
    return {
        name: score_posterior(posterior, features, scored.targets, estimates, universes, seed)
        for name, (posterior, features) in posteriors.items()
    }


def _format(scores: dict[str, PosteriorScores]) -> list[str]:
    """Return the table of the scores, and the verdicts, as lines."""
    names = [parameter.name for parameter in PARAMETERS]
    rows = [["MAE", "all", *names, "NLL", *(f"in {level:.0%}" for level in LEVELS)]]
    for name, each in scores.items():
        # The extremes of the four parameters: an average would hide a bad one.
        coverage = [f"{row.min():.1%}..{row.max():.1%}" for row in each.calibration.coverage]
        errors = [f"{value:.3f}" for value in (each.mae.mean(), *each.mae)]
        rows.append([_TITLES[name], *errors, f"{each.nll:.3f}", *coverage])
    verdicts = [f"{_TITLES[name]}: {each.calibration.verdict}" for name, each in scores.items()]
    return [*format_table(rows).splitlines(), *verdicts]


if __name__ == "__main__":
    sys.exit(main())
