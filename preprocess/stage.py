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

from pipelines.console import print_line
from pipelines.dataset.open import open_folder
from pipelines.distributed.cli import OneLineParser, launched, location, report_errors
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
from pipelines.errors import UserError
from pipelines.sample import SPLITS
from pipelines.settings import add_flags, build
from preprocess.conversion.progress import STOPPED
from preprocess.staging.config import StageConfig
from preprocess.staging.stager import describe, stage


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if every sample is on every node that needs it."""
    parser = OneLineParser("preprocess.stage", "Stage a data set to the disk of every node.")
    text = "folder or URL of train and validation"
    parser.add_argument("-i", "--input-dir", type=location, required=True, help=text)
    parser.add_argument(
        "-o", "--output-dir", dest="dir", required=True, help="folder on each node's own disk"
    )
    add_flags(parser, StageConfig)
    parser.add_argument("--models", type=int, default=1, help="number of models trained side by side")
    text = "consecutive nodes that share every sample; each keeps its slab of packed ones"
    parser.add_argument("--nodes-per-sample", type=int, default=1, help=text)
    arguments = parser.read(argv)
    world, faults = launched(), 0
    with report_errors(world, STOPPED) as session:
        values = vars(arguments)
        source, num_instances = values.pop("input_dir"), values.pop("models")
        nodes_per_sample = values.pop("nodes_per_sample")
        config: StageConfig = build(StageConfig, values, "data.stage.")
        session.connect()
        splits = session.run_on_root(lambda: {str(name): open_folder(source / name) for name in SPLITS})
        staged = stage(
            splits, config.folder, config, session, num_instances, nodes_per_sample=nodes_per_sample
        )
        for dataset, report in staged:
            if world.is_root:
                print_line(describe(dataset, report, world.nodes))
                for fault in dict.fromkeys(report.faults):
                    print_line(f"error: {fault}", sys.stderr)
            faults += len(report.faults)
        if faults:
            raise UserError(f"{faults} samples are damaged and on no node; fix them and stage again")
    return 0


if __name__ == "__main__":
    exit_now(main(), World.detect())
