"""Score trained weights: `python -m cosmoflow_dali.evaluate --data-dir D --weights W`.

Prints one JSON object with `mae`, `mse`, `mae_per_parameter` and `samples`. Runs alone or under a
launcher, on a GPU if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.training.evaluation import evaluate
from cosmoflow_dali.training.pretrained import load_model
from pipelines.console import check_output
from pipelines.dataset.open import open_folder
from pipelines.distributed.cli import OneLineParser, launched, report_errors
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.sample import ALL_SPLITS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    world = launched()
    with report_errors(world) as session:
        parser = OneLineParser("cosmoflow_dali.evaluate", __doc__)
        parser.add_argument("--data-dir", type=Path, required=True, help="folder with train/ and validation/")
        parser.add_argument("--weights", type=Path, required=True, help="a checkpoint or a reference .npz")
        parser.add_argument("--split", choices=ALL_SPLITS, default="validation", help="samples to score")
        parser.add_argument("--batch-size", type=int, default=4, help="samples per batch on each rank")
        text = "auto is a GPU if there is one"
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)
        arguments = parser.parse_args(argv)
        config = LoaderConfig(batch_size=arguments.batch_size)
        device = world.device(arguments.device)
        configure_torch(device, world.cores)
        session.connect(device)
        loaded = session.run_on_all_ranks(lambda: load_model(arguments.weights))
        split = session.run_on_root(lambda: open_folder(arguments.data_dir / arguments.split))
        loaded.check_spec(split.root, split.spec)
        config = replace(config, apply_log=loaded.apply_log)
        rank_slice = RankSlice(world.rank, world.size)
        loader = Loader(
            split, config, rank_slice=rank_slice, seed=0, shuffle=False, ragged="pad", device=device
        )
        with closing(loader):
            result = evaluate(loaded.model.to(device), loader, session)
        if world.is_root:
            print(json.dumps(result.scores()))
            check_output()
    return 0


if __name__ == "__main__":
    exit_now(main(), World.detect())
