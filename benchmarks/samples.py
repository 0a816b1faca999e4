"""The samples that benchmarks work on: simulated ones, in every format, in the page cache."""

from __future__ import annotations

import functools
import gzip
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.registry import FORMATS
from pipelines.formats.tf_example import encode_example
from pipelines.formats.tfrecord import TFRECORD_SUFFIX, frame
from pipelines.sample import Sample
from preprocess.simulator.universe import SimulateConfig, simulate_universe

_BOX = 128.0
"""Mpc/h along an edge: voxels of 1 Mpc/h at 128^3, as the published samples have."""

_PUBLISHED_LEVEL = 6
"""Of zlib; the published files are as large as that makes them."""


@functools.lru_cache(maxsize=16)
def simulated(index: int, size: int) -> Sample:
    """Sample `index` of `size`^3, always the same: a universe of its own, in 8 steps from 128^3 on."""
    config = SimulateConfig(size=size, voxel=_BOX / size, steps=8 if size >= 128 else 4)
    ((_, sample),) = simulate_universe(config, "train", index)
    return sample


def compressed(sample: Sample) -> bytes:
    """`sample` as the published files have it: a gzip TFRecord of zlib's default level."""
    return gzip.compress(frame(encode_example(sample)), _PUBLISHED_LEVEL, mtime=0)


def make_splits(root: Path, forms: Sequence[str], samples: int, size: int) -> dict[str, SampleDataset]:
    """`samples` simulated samples of `size`^3 in each of `forms`, in the page cache; made if missing."""
    splits = {}
    for format_name in forms:
        folder = root / f"{samples}x{size}" / format_name
        if not folder.exists():
            # Under another name until it is whole: who is interrupted leaves no set that looks like one.
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write(partial, format_name, [(_stem(index), simulated(index, size)) for index in range(samples)])
            partial.rename(folder)
        for file in folder.iterdir():
            file.read_bytes()
        splits[format_name] = open_folder(folder)
    return splits


def _stem(index: int) -> str:
    return f"universe_{index:04d}"


def _write(folder: Path, format_name: str, samples: Sequence[tuple[str, Sample]]) -> None:
    if format_name == "packed":
        write_shard(
            folder / "shard_000000.tar", ((stem + MEMBER_SUFFIX, encode(sample)) for stem, sample in samples)
        )
        return
    write: Callable[[Path, str, Sample], object] = FORMATS[format_name].write
    if format_name == "tfrecord_gzip":

        def write(folder: Path, stem: str, sample: Sample) -> object:
            return (folder / f"{stem}{TFRECORD_SUFFIX}").write_bytes(compressed(sample))

    for stem, sample in samples:
        write(folder, stem, sample)
