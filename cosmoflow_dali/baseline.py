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

import torch

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.posterior.fitted import Features, fit_posteriors
from cosmoflow_dali.posterior.partition import LEAST_UNIVERSES
from cosmoflow_dali.posterior.summaries import num_basic_summaries
from cosmoflow_dali.reporting.posteriors import score_posteriors, score_table, scores_to_json, verdicts
from cosmoflow_dali.reporting.read_features import read_features
from pipelines.console import print_line
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import has_split, open_folder
from pipelines.distributed.cli import OneLineParser, local_path, location, report_errors
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.errors import DataError
from pipelines.filesystem import refuse_input
from pipelines.loading.reader import Reader
from pipelines.output import write_output
from pipelines.tables import format_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    world = World()
    with report_errors(world):
        parser = OneLineParser("cosmoflow_dali.baseline", __doc__)
        parser.add_argument(
            "data",
            type=location,
            metavar="DATA",
            help="folder or URL of train/ and test/ or validation/",
        )
        parser.add_argument("--output", type=local_path, metavar="FILE", help="JSON file for all scores")
        parser.add_argument(
            "--seed", type=int, default=0, help="seed of the fit and of the draws, at least 0"
        )
        arguments = parser.parse_args(argv)
        if arguments.seed < 0:
            parser.error(f"--seed {arguments.seed}: must be at least 0")
        configure_torch(torch.device("cpu"), world.cores)
        start, root = time.perf_counter(), arguments.data
        scored_name = "test" if has_split(root, "test") else "validation"
        datasets = [open_folder(root / name) for name in ("train", scored_name)]
        if datasets[0].spec != datasets[1].spec:
            fault = f"holds samples of shape {datasets[1].spec.shape}, and train/ of {datasets[0].spec.shape}"
            raise DataError(datasets[1].root, fault, "use splits of one data set")
        if arguments.output is not None:
            refuse_input(arguments.output, [path for dataset in datasets for path in dataset.all_files()])
        session = Session(world)
        train, scored = (_read(dataset, session) for dataset in datasets)
        fitted = fit_posteriors(None, train, num_basic_summaries(datasets[0].spec), arguments.seed)
        scores = scores_to_json(score_posteriors(fitted, scored, arguments.seed), scored)
        result = {
            "data": str(root),
            "split": scored_name,
            "train_samples": len(train),
            "summaries": train.summaries.shape[1],
            "seed": arguments.seed,
            "seconds": time.perf_counter() - start,
            **scores,
        }
        if arguments.output is not None:
            write_output(
                arguments.output, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode())
            )
        for line in (*format_table(score_table(result["scores"])).splitlines(), *verdicts(result)):
            print_line(line)
    return 0


def _read(dataset: SampleDataset, session: Session) -> Features:
    """Return the features of all samples; DataError if there are too few universes."""
    features = read_features(Reader(dataset), None, session)
    assert features is not None
    if (universes := features.num_universes) < LEAST_UNIVERSES:
        raise DataError(dataset.root, f"holds {universes} universes", f"expected at least {LEAST_UNIVERSES}")
    return features


if __name__ == "__main__":
    sys.exit(main())
