"""Score trained weights: `python -m cosmoflow_dali.evaluate --data-dir D --weights W`.

Prints one JSON object with `mae`, `mse`, `mae_per_parameter`, `samples`, and `posterior`: the scores of the
posteriors that lie beside the weights (posterior.pt), or null. With --against DIR, it also has `against`, the
same for the samples of that data set, and `shift`, by how much the posteriors of universes that are in both
sets differ. Tables of these scores go to standard error. Runs alone or under a launcher, on a GPU if there is
one.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.posterior.fitted import Features, FittedPosteriors
from cosmoflow_dali.reporting.posteriors import (
    Scores,
    score_posteriors,
    score_table,
    scores_to_json,
    verdicts,
)
from cosmoflow_dali.reporting.read_features import Network, read_features
from cosmoflow_dali.reporting.shift import measure_shift, shift_table
from cosmoflow_dali.training.evaluation import evaluate
from cosmoflow_dali.training.posterior_file import POSTERIOR, load_posteriors
from cosmoflow_dali.training.pretrained import LoadedModel, load_model
from pipelines.console import check_output, print_line
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.distributed.cli import OneLineParser, launched, location, report_errors
from pipelines.distributed.session import Session, exit_now
from pipelines.distributed.world import World
from pipelines.errors import DataError
from pipelines.filesystem import is_present
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.loading.reader import Reader
from pipelines.plan import RankSlice
from pipelines.sample import ALL_SPLITS
from pipelines.tables import format_table

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    world = launched()
    with report_errors(world) as session:
        parser = OneLineParser("cosmoflow_dali.evaluate", __doc__)
        text = "folder or URL of train/ and validation/"
        parser.add_argument("--data-dir", type=location, required=True, help=text)
        parser.add_argument("--weights", type=Path, required=True, help="a checkpoint or a reference .npz")
        parser.add_argument("--split", choices=ALL_SPLITS, default="validation", help="samples to score")
        text = "second data set, whose samples of the same split are scored beside the first"
        parser.add_argument("--against", type=location, metavar="DIR", help=text)
        parser.add_argument("--batch-size", type=int, default=4, help="samples per batch on each rank")
        text = "auto is a GPU if there is one"
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)
        arguments = parser.parse_args(argv)
        config = LoaderConfig(batch_size=arguments.batch_size)
        device = world.device(arguments.device)
        configure_torch(device, world.cores)
        session.connect(device)
        loaded = session.run_on_all_ranks(lambda: load_model(arguments.weights))
        fitted = session.run_on_all_ranks(lambda: _find_posteriors(loaded, world))
        config = replace(config, apply_log=loaded.apply_log)
        splits = []
        for folder in (arguments.data_dir, arguments.against):
            if folder is not None:
                split = session.run_on_root(functools.partial(open_folder, folder / arguments.split))
                loaded.check_spec(split.root, split.spec)
                splits.append(split)
        evaluated = [_evaluate(loaded, fitted, split, config, device, session) for split in splits]
        if world.is_root:
            result = evaluated[0].result
            if arguments.against is not None:
                first, second = evaluated
                result |= {"against": second.result, "shift": _shift(first, second)}
            print(json.dumps(result))
            check_output()
    return 0


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """Scores of one split.

    Attributes:
        result: Scores, for programs.
        features: What the posteriors are conditioned on; None without posteriors, and except on rank 0.
        scores: Scores of the posteriors; empty without them, and except on rank 0.
    """

    result: dict[str, Any]
    features: Features | None
    scores: Scores


def _find_posteriors(loaded: LoadedModel, world: World) -> FittedPosteriors | None:
    """Return the posteriors of the weights; None if there are none, or, with a warning, none of these."""
    if not is_present(loaded.path.parent / POSTERIOR):
        return None
    try:
        return load_posteriors(loaded.path, loaded.model)
    except DataError as error:
        if world.is_root:
            logger.warning("%s", error)
        return None


def _evaluate(
    loaded: LoadedModel,
    fitted: FittedPosteriors | None,
    split: SampleDataset,
    config: LoaderConfig,
    device: torch.device,
    session: Session,
) -> _Evaluated:
    """Score the network, and its posteriors if there are any, on `split`; all ranks take part."""
    world, model = session.world, loaded.model.to(device)
    loader = Loader(
        split,
        config,
        rank_slice=RankSlice(world.rank, world.size),
        seed=0,
        shuffle=False,
        ragged="pad",
        device=device,
    )
    with closing(loader):
        result: dict[str, Any] = {**evaluate(model, loader, session).scores(), "posterior": None}
    if fitted is None:
        return _Evaluated(result, None, {})
    reader = Reader(split, apply_log=loaded.apply_log)
    features = read_features(reader, Network(model, loaded.apply_log), session)
    if features is None:
        return _Evaluated(result, None, {})
    scores = score_posteriors(fitted, features, seed=0)
    result["posterior"] = scores_to_json(scores, features)
    _print_table(str(split.root), score_table(result["posterior"]["scores"]), verdicts(result["posterior"]))
    return _Evaluated(result, features, scores)


def _shift(first: _Evaluated, second: _Evaluated) -> dict[str, Any] | None:
    """Return the shift of the posteriors between two sets; None without posteriors or pairs."""
    if first.features is None or second.features is None:
        return None
    shift = measure_shift(first.features, first.scores, second.features, second.scores)
    if shift is not None:
        _print_table(f"{shift['pairs']} samples of both sets", shift_table(shift), [])
    return shift


def _print_table(title: str, rows: list[list[str]], lines: list[str]) -> None:
    """Print `title`, the table of `rows`, and `lines` to standard error, as standard output has the JSON."""
    for line in (title, *format_table(rows).splitlines(), *lines):
        print_line(line, sys.stderr)


if __name__ == "__main__":
    exit_now(main(), World.detect())
