"""Samples of the benchmarks: simulated ones, in every format, in the page cache."""

from __future__ import annotations

import argparse
import functools
import gzip
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import harness
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.formats.packed.encode import DEFAULT_PRESET, PRESETS, encode
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.header import VERSION
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.registry import FORMATS
from pipelines.formats.tf_example import encode_example
from pipelines.formats.tfrecord import TFRECORD_SUFFIX, frame
from pipelines.sample import Sample
from preprocess.simulator.universe import SimulateConfig, simulate_universe

_BOX = 128.0
"""Edge in Mpc/h: voxels of 1 Mpc/h at 128^3, as in the published samples."""

_PUBLISHED_LEVEL = 6
"""zlib level that gives the size of the published files."""


@functools.lru_cache(maxsize=16)
def simulated(index: int, size: int) -> Sample:
    """Return sample `index` of `size`^3, a separate universe and always the same."""
    config = SimulateConfig(size=size, voxel=_BOX / size, steps=8 if size >= 128 else 4)
    ((_, sample),) = simulate_universe(config, "train", index)
    return sample


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `chosen_samples` reads."""
    parser.add_argument("--data", type=Path, help="folder of samples in any format (default: simulated)")
    parser.add_argument("--samples", type=harness.positive, default=3)
    parser.add_argument("--size", type=int, default=128, choices=(32, 64, 128, 256), help="of simulated ones")


def chosen_samples(options: argparse.Namespace) -> list[Sample]:
    """Return the samples of folder --data, or simulated ones."""
    if not options.data:
        return [simulated(index, options.size) for index in range(options.samples)]
    split = open_folder(options.data)
    return [split.read(index) for index in range(min(options.samples, len(split)))]


def framed(sample: Sample) -> bytes:
    """Return `sample` as a TFRecord."""
    return b"".join(frame(encode_example(sample)))


def compressed(sample: Sample) -> bytes:
    """Return `sample` as a gzip TFRecord of zlib's default level, like the published files."""
    return gzip.compress(framed(sample), _PUBLISHED_LEVEL, mtime=0)


KINDS = (*FORMATS, *(f"packed_{preset}" for preset in PRESETS if preset != DEFAULT_PRESET))
"""The formats, and the packed format with the presets that are not its default."""


def make_splits(root: Path, kinds: Sequence[str], samples: int, size: int) -> dict[str, SampleDataset]:
    """Return `samples` simulated samples of `size`^3 of each kind, in the page cache; make missing ones."""
    splits = {}
    for kind in kinds:
        folder = root / f"{samples}x{size}" / folder_name(kind)
        if not folder.exists():
            # Written under another name, so that an interrupted set does not look complete.
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_samples(kind, partial, [simulated(index, size) for index in range(samples)])
            partial.rename(folder)
        for file in folder.iterdir():
            file.read_bytes()
        splits[kind] = open_folder(folder)
    return splits


def folder_name(kind: str) -> str:
    """Return a name for a folder of `kind`, which older versions of the packed format did not use."""
    return f"{kind}_v{VERSION}" if kind.startswith("packed") else kind


def write_samples(kind: str, folder: Path, samples: Sequence[Sample]) -> None:
    """Write `samples` to `folder`, as one of KINDS; gzip as published."""
    named = [(f"universe_{index:04d}", sample) for index, sample in enumerate(samples)]
    if kind.startswith("packed"):
        preset = kind.removeprefix("packed_") if "_" in kind else DEFAULT_PRESET
        members = ((name + MEMBER_SUFFIX, encode(sample, preset)) for name, sample in named)
        write_shard(folder / "shard_000000.tar", members)
        return
    write: Callable[[Path, str, Sample], object] = FORMATS[kind].write
    if kind == "tfrecord_gzip":

        def write(folder: Path, name: str, sample: Sample) -> object:
            return (folder / f"{name}{TFRECORD_SUFFIX}").write_bytes(compressed(sample))

    for name, sample in named:
        write(folder, name, sample)
