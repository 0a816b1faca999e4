"""Score trained weights: `python -m cosmoflow_dali.evaluate --data-dir D --weights W`.

Prints one JSON object with `mae`, `mse`, `mae_per_parameter` and `samples`. Runs alone or under a
launcher, on a GPU where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.training.evaluation import evaluate
from cosmoflow_dali.training.pretrained import load_trained
from pipelines.dataset.open import open_split
from pipelines.distributed.cli import OneLineParser, launched, report_errors
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
from pipelines.errors import DataError
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.sample import SPLITS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    world = launched()
    with report_errors(world) as session:
        parser = OneLineParser(prog="python -m cosmoflow_dali.evaluate", description=__doc__)
        parser.add_argument("--data-dir", type=Path, required=True, help="holds train/ and validation/")
        parser.add_argument("--weights", type=Path, required=True, help="a checkpoint or a reference .npz")
        parser.add_argument("--split", choices=SPLITS, default="validation")
        parser.add_argument("--batch-size", type=int, default=4, help="samples at a time on each rank")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        arguments = parser.parse_args(argv)
        config = LoaderConfig(batch_size=arguments.batch_size)
        device = world.device(arguments.device)
        configure_torch(device, world.cores)
        session.connect(device)
        trained = session.run_on_all_ranks(lambda: load_trained(arguments.weights))
        split = session.run_on_root(lambda: open_split(arguments.data_dir, arguments.split))
        if split.spec.size != trained.size:
            raise DataError(
                split.root,
                f"samples are {split.spec.size} voxels wide",
                f"{arguments.weights} takes samples of {trained.size}",
            )
        loader = Loader(
            split,
            replace(config, apply_log=trained.apply_log),
            rank_slice=RankSlice(world.rank, world.size),
            seed=0,
            shuffle=False,
            ragged="pad",
            device=device,
        )
        try:
            model = trained.model.to(device)
            result = evaluate(model, loader, session)
        finally:
            loader.close()
        if world.is_root:
            print(json.dumps(result.scores()))
    return 0


if __name__ == "__main__":
    exit_now(main(), World.detect())
