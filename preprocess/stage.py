"""Stage a data set to the disk of every node before training.

    srun --ntasks-per-node=4 python -m preprocess.stage -i /gpfs/cosmoflow/gzip -o /raid/cosmoflow

Each node gets all samples, or with --shard-type local each team of nodes a partition of them, decompressed,
as npy. One node reads each file from the shared file system and sends it to the others that need it. With
--models, each model that is to be trained has consecutive nodes, with all samples on them. A second run on a
staged node stages nothing. The trainer, with the same settings in `data: {stage: ...}`, then finds the
samples there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.dataset.open import open_folder
from pipelines.distributed.cli import OneLineParser, launched, report_errors
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
from pipelines.errors import UserError
from pipelines.sample import SPLITS
from preprocess.conversion.progress import STOPPED
from preprocess.staging.config import StageConfig
from preprocess.staging.stager import describe, stage


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if every sample is on every node that needs it."""
    parser = OneLineParser(
        prog="python -m preprocess.stage", description="Stage a data set to the disk of every node."
    )
    parser.add_argument("-i", "--input-dir", type=Path, required=True, help="holds train and validation")
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="on each node's own disk")
    parser.add_argument(
        "--shard-type", choices=("global", "local"), default="global", help="all samples, or a partition"
    )
    parser.add_argument("--shard-multiplier", type=int, default=1, help="nodes that get the same partition")
    parser.add_argument("--preshuffle", action="store_true", help="draw the partitions by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--models", type=int, default=1, help="number that train side by side")
    parser.add_argument("--threads", type=int, default=8, help="of each rank")
    parser.add_argument("--direct-io", action="store_true", help="read past the page cache")
    arguments = parser.read(argv)
    world, faults = launched(), 0
    with report_errors(world, STOPPED) as session:
        config = StageConfig(
            str(arguments.output_dir),
            arguments.shard_type,
            arguments.shard_multiplier,
            arguments.preshuffle,
            arguments.seed,
            arguments.threads,
            arguments.direct_io,
        )
        session.connect()
        splits = session.run_on_root(
            lambda: {str(name): open_folder(arguments.input_dir / name) for name in SPLITS}
        )
        for dataset, report in stage(splits, config.folder, config, session, arguments.models):
            if world.is_root:
                print(describe(dataset, report, world.nodes))
                for fault in dict.fromkeys(report.faults):
                    print(f"error: {fault}", file=sys.stderr)
            faults += len(report.faults)
        if faults:
            raise UserError(f"{faults} samples are damaged and on no node; fix them and stage again")
    return 0


if __name__ == "__main__":
    exit_now(main(), World.detect())
