"""Convert samples between all formats that the project reads.

    python -m preprocess.convert -i SRC -o DST --to npy
    mpirun -n 64 python -m preprocess.convert -i SRC -o DST --to npy

SRC is a folder of samples, or one that holds `train` and `validation`; DST becomes the same. The ranks of
mpirun, srun or torchrun, or the single process without a launcher, share the samples; each has worker
processes for its cores. A run that was stopped resumes when the same command is started again: entries that
are complete and made from the same source file are kept. SRC and DST may be URLs; see docs/clouds.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.dataset.open import open_folder, split_dirs
from pipelines.distributed.cli import OneLineParser, location, target_location
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, DataError
from pipelines.filesystem import refuse_input
from pipelines.formats.packed.encode import DEFAULT_PRESET, PRESETS
from pipelines.formats.packed.format import PackedFormat
from pipelines.formats.registry import FORMATS
from pipelines.storage.location import Location
from preprocess.conversion.convert_task import ConvertTask
from preprocess.conversion.engine import ConversionPlan, run
from preprocess.conversion.task_result import WorkItem

SAMPLES_PER_SHARD, _SHARD_VOXELS = 64, 64 * 128**3
"""Samples of a shard, and voxels of them all, at most: 120 MB, and 9,216 shards of the published set."""


_PROCESS_BYTES, _SAMPLE_COPIES = 100 * 10**6, 3
"""Memory of a process that converts: the program, and the sample with what is made of it (2.2 measured)."""


def plan_conversion(
    source: Location,
    target: Location,
    to: str,
    samples_per_shard: int | None = None,
    expected: str | None = None,
    codec: str = DEFAULT_PRESET,
) -> ConversionPlan:
    """Plan the conversion of the samples in `source` to the format `to` in `target`.

    Args:
        source: Folder of samples.
        target: Folder that they are converted into.
        to: A key of FORMATS.
        samples_per_shard: Samples of each shard, in a format that has shards; None for 64, or fewer of more
            than 128^3 voxels.
        expected: Format that the source must have; None for any.
        codec: A key of PRESETS, for packed samples.

    Raises:
        DataError: `source` has no samples, is not of the format `expected`, or is `target`.
    """
    dataset = open_folder(source)
    if expected not in (None, dataset.format_name):
        remedy = f"expected {expected}, as the command line says"
        raise DataError(source, f"holds {dataset.format_name}", remedy)
    if isinstance(target, Path):
        refuse_input(target, [source])
    elif target == source:
        raise DataError(target, "is the input itself", "choose another output")
    sharded = to == PackedFormat.name
    usual = max(1, min(SAMPLES_PER_SHARD, _SHARD_VOXELS // dataset.spec.size**3))
    size, indices = (samples_per_shard or usual) if sharded else 1, np.arange(len(dataset))
    sources = [dataset.subset(indices[start : start + size]) for start in range(0, len(dataset), size)]
    sample_ids = [dataset.sample_id(index) for index in range(len(dataset))]
    names = [f"shard_{number:06d}" for number in range(len(sources))] if sharded else sample_ids
    items = [WorkItem(source, [name]) for source, name in zip(sources, names, strict=True)]
    task, shard_size = ConvertTask(target, to, codec), size if sharded else None
    memory = _PROCESS_BYTES + _SAMPLE_COPIES * dataset.spec.bytes
    return ConversionPlan(target, to, dataset.spec, task, memory, items, sample_ids, shard_size)


def convert(
    source: Location,
    target: Location,
    to: str,
    *,
    workers: int | None,
    samples_per_shard: int | None = None,
    expected: str | None = None,
    codec: str | None = None,
) -> int:
    """Convert a folder of samples, or the splits of a data set; return the exit status."""

    def make_plans() -> list[ConversionPlan]:
        if to not in FORMATS:
            raise ConfigError("--to", to, f"expected one of {', '.join(sorted(FORMATS))}")
        if samples_per_shard is not None and samples_per_shard < 1:
            raise ConfigError("--samples-per-shard", samples_per_shard, "expected at least one")
        if codec is not None and to != PackedFormat.name:
            raise ConfigError("--codec", codec, f"only --to {PackedFormat.name} has a choice of codecs")
        preset = codec or DEFAULT_PRESET
        return [
            plan_conversion(source / split, target / split, to, samples_per_shard, expected, preset)
            for split in split_dirs(source)
        ]

    return run(make_plans, workers, "file", target)


def convert_tfrecords(name: str, to: str, argv: Sequence[str] | None) -> int:
    """Run the command line of one of the original's two converters, from TFRecords to the format `to`."""
    parser = _parser(
        name, f"Convert a folder of TFRecords to {to}: preprocess.convert, as the original names it."
    )
    parser.add_argument("-p", "--num-processes", type=int, help="processes of each rank")
    parser.add_argument(
        "-c", "--compression", type=str.lower, choices=["gzip"], help="of TFRecords (default: as found)"
    )
    arguments = parser.read(argv)
    expected = "tfrecord_gzip" if arguments.compression else None
    workers = arguments.num_processes
    return convert(arguments.input_dir, arguments.output_dir, to, workers=workers, expected=expected)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser("convert", "Convert samples between all formats that the project reads.")
    parser.add_argument("--to", required=True, help="one of " + ", ".join(sorted(FORMATS)))
    parser.add_argument("--workers", type=int, help="processes of each rank (default: two a core)")
    text = f"samples of each shard of packed samples (default: {SAMPLES_PER_SHARD}, fewer of larger ones)"
    parser.add_argument("--samples-per-shard", type=int, help=text)
    text = f"compression of packed samples that are written (default: {DEFAULT_PRESET}); see docs/packed.md"
    parser.add_argument("--codec", choices=sorted(PRESETS), help=text)
    arguments = parser.read(argv)
    return convert(
        arguments.input_dir,
        arguments.output_dir,
        arguments.to,
        workers=arguments.workers,
        samples_per_shard=arguments.samples_per_shard,
        codec=arguments.codec,
    )


def _parser(name: str, description: str) -> OneLineParser:
    parser = OneLineParser(f"preprocess.{name}", description)
    text = "folder or URL of samples or splits"
    parser.add_argument("-i", "--input-dir", type=location, required=True, help=text)
    text = "folder or URL to write"
    parser.add_argument("-o", "--output-dir", type=target_location, required=True, help=text)
    return parser


if __name__ == "__main__":
    exit_now(main(), World.detect())
