"""Convert samples from and to every format that the project reads.

    python -m preprocess.convert -i SRC -o DST --to npy
    mpirun -n 64 python -m preprocess.convert -i SRC -o DST --to npy

SRC is a folder of samples, or one that holds `train` and `validation`; DST becomes the same. Ranks
of mpirun, srun or torchrun, or the one process that there is without these, share the samples, and
each has processes for its cores. A run that was stopped goes on where it was: what is there, whole
and made from the same file is not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.dataset import open_folder
from pipelines.errors import ConfigError, DataError
from pipelines.formats import FORMATS
from preprocess.conversion import Conversion
from preprocess.produce import Order, run
from preprocess.workforce import Task

_SPLITS = ("train", "validation")


def order_conversion(source: Path, target: Path, to: str, expected: str | None = None) -> tuple[Order, Task]:
    """The order to have the samples in `source` as `to` in `target`, and the task for it.

    DataError where `source` has no samples, none of the format `expected`, or is `target`.
    """
    split = open_folder(source)
    if expected is not None and split.form != expected:
        raise DataError(source, f"holds {split.form}", f"expected {expected}, as the command line says")
    if target.exists() and target.samefile(source):
        raise DataError(target, "is the source itself", "choose another folder")
    stems = (split.stem(index) for index in range(len(split)))
    order = Order(target, to, split.spec, {stem: (stem,) for stem in stems})
    return order, Conversion(str(source), split.form, split.spec.size, split.spec.channels, str(target), to)


def convert(source: Path, target: Path, to: str, *, workers: int | None, expected: str | None = None) -> int:
    """Run the command line; the exit status."""

    def orders() -> list[tuple[Order, Task]]:
        if to not in FORMATS:
            raise ConfigError("--to", to, f"expected one of {', '.join(sorted(FORMATS))}")
        splits = [split for split in _SPLITS if (source / split).is_dir()]
        pairs = [(source / split, target / split) for split in splits] or [(source, target)]
        return [order_conversion(*pair, to, expected) for pair in pairs]

    return run(orders, workers=workers, unit="sample", target=target)


def convert_as_original(name: str, to: str, argv: Sequence[str] | None) -> int:
    """The command lines of the original's two converters, from TFRecords to the format `to`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m preprocess.{name}",
        description=f"Convert a folder of TFRecords to {to}: preprocess.convert under its original name.",
    )
    parser.add_argument("-i", "--input-dir", type=Path, required=True, help="folder of TFRecords")
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help=f"folder for {to}")
    parser.add_argument("-p", "--num-processes", type=int, help="processes of each rank")
    parser.add_argument(
        "-c", "--compression", type=str.lower, choices=["gzip"], help="of the TFRecords (default: as found)"
    )
    arguments = parser.parse_args(argv)
    expected = "tfrecord_gzip" if arguments.compression else None
    return convert(
        arguments.input_dir, arguments.output_dir, to, workers=arguments.num_processes, expected=expected
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.convert",
        description="Convert samples from and to every format that the project reads.",
    )
    parser.add_argument("-i", "--input-dir", type=Path, required=True, help="samples, or both splits")
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="folder that becomes the same")
    parser.add_argument("--to", required=True, help="one of " + ", ".join(sorted(FORMATS)))
    parser.add_argument("--workers", type=int, help="processes of each rank (default: two a core)")
    arguments = parser.parse_args(argv)
    return convert(arguments.input_dir, arguments.output_dir, arguments.to, workers=arguments.workers)


if __name__ == "__main__":
    sys.exit(main())
