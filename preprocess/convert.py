"""Convert samples from and to every format that the project reads.

    python -m preprocess.convert -i SRC -o DST --to npy
    mpirun -n 64 python -m preprocess.convert -i SRC -o DST --to npy

SRC is a folder of samples, or one that holds `train` and `validation`; DST becomes the same. Ranks
of mpirun, srun or torchrun, or the one process that there is without these, share the samples, and
each has processes for its cores. A run that was stopped goes on where it was: what is there, whole
and made from the same file is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.dataset.open import open_folder, split_dirs
from pipelines.distributed.cli import OneLineParser
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, DataError
from pipelines.formats.packed.format import PackedFormat
from pipelines.formats.registry import FORMATS
from preprocess.conversion.convert_task import Conversion, lines_of
from preprocess.conversion.engine import Job, Order, add_prune, run
from preprocess.conversion.worker_pool import Task

A_SHARD = 64
"""Samples in a shard: 150 MB of packed ones of 128^3, and 9,216 shards of the published set."""


def order_conversion(
    source: Path,
    target: Path,
    to: str,
    *,
    a_shard: int = A_SHARD,
    expected: str | None = None,
    prune: bool = False,
) -> tuple[Order, Task]:
    """The order to have the samples in `source` as `to` in `target`, and the task for it.

    a_shard: samples in a shard, of a format that has them. prune: see Order. DataError where `source`
        has no samples, none of the format `expected`, or is `target`.
    """
    split = open_folder(source)
    if expected is not None and split.format_name != expected:
        raise DataError(
            source, f"holds {split.format_name}", f"expected {expected}, as the command line says"
        )
    if target.exists() and target.samefile(source):
        raise DataError(target, "is the source itself", "choose another folder")
    lines, sharded = lines_of(split), to == PackedFormat.name
    stems = [split.sample_id(index) for index in range(len(split))]
    if sharded:
        starts = range(0, len(lines), a_shard)
        jobs = [Job(lines[at : at + a_shard], [f"shard_{at // a_shard:06d}"]) for at in starts]
    else:
        jobs = [Job([line], [stem]) for line, stem in zip(lines, stems, strict=True)]
    conversion = Conversion(
        str(source), split.format_name, split.spec.size, split.spec.channels, str(target), to, sharded
    )
    return Order(target, to, split.spec, jobs, stems, prune), conversion


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    workers: int | None,
    a_shard: int = A_SHARD,
    expected: str | None = None,
    prune: bool = False,
) -> int:
    """Run the command line; the exit status."""

    def orders() -> list[tuple[Order, Task]]:
        if to not in FORMATS:
            raise ConfigError("--to", to, f"expected one of {', '.join(sorted(FORMATS))}")
        if a_shard < 1:
            raise ConfigError("--samples-per-shard", a_shard, "expected at least one")
        return [
            order_conversion(
                source / part, target / part, to, a_shard=a_shard, expected=expected, prune=prune
            )
            for part in split_dirs(source)
        ]

    return run(orders, workers=workers, unit="file", target=target)


def convert_as_original(name: str, to: str, argv: Sequence[str] | None) -> int:
    """The command lines of the original's two converters, from TFRecords to the format `to`."""
    parser = OneLineParser(
        prog=f"python -m preprocess.{name}",
        description=f"Convert a folder of TFRecords to {to}: preprocess.convert under its original name.",
    )
    parser.add_argument("-i", "--input-dir", type=Path, required=True, help="folder of TFRecords")
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help=f"folder for {to}")
    parser.add_argument("-p", "--num-processes", type=int, help="processes of each rank")
    parser.add_argument(
        "-c", "--compression", type=str.lower, choices=["gzip"], help="of the TFRecords (default: as found)"
    )
    add_prune(parser)
    arguments = parser.read(argv)
    return convert(
        arguments.input_dir,
        arguments.output_dir,
        to,
        workers=arguments.num_processes,
        expected="tfrecord_gzip" if arguments.compression else None,
        prune=arguments.prune,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and convert."""
    parser = OneLineParser(
        prog="python -m preprocess.convert",
        description="Convert samples from and to every format that the project reads.",
    )
    parser.add_argument("-i", "--input-dir", type=Path, required=True, help="samples, or both splits")
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="folder that becomes the same")
    parser.add_argument("--to", required=True, help="one of " + ", ".join(sorted(FORMATS)))
    parser.add_argument("--workers", type=int, help="processes of each rank (default: two a core)")
    parser.add_argument(
        "--samples-per-shard", type=int, default=A_SHARD, help=f"of packed ones (default: {A_SHARD})"
    )
    add_prune(parser)
    arguments = parser.read(argv)
    return convert(
        arguments.input_dir,
        arguments.output_dir,
        arguments.to,
        workers=arguments.workers,
        a_shard=arguments.samples_per_shard,
        prune=arguments.prune,
    )


if __name__ == "__main__":
    exit_now(main(), World.detect())
