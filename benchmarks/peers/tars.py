"""Tar shards in WebDataset's layout: the members of a sample share a name, and differ in the extension."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.contract import WORKERS
from benchmarks.peers.volumes import blosc2_bytes, each_once, raw
from pipelines.sample import Sample

SHARDS = 2 * WORKERS
"""Shards of a set: workers take whole ones."""


def write_raw(folder: Path, samples: Sequence[Sample]) -> None:
    """Write counts and targets as they are in memory."""
    _write(folder, samples, "counts", raw)


def write_blosc2(folder: Path, samples: Sequence[Sample]) -> None:
    """Write compressed planar counts."""
    _write(folder, samples, "counts", blosc2_bytes)


def write_npy(folder: Path, samples: Sequence[Sample]) -> None:
    """Write counts as .npy files."""
    _write(folder, samples, "npy", _npy)


def _npy(sample: Sample) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, sample.counts)
    return buffer.getvalue()


def _write(
    folder: Path, samples: Sequence[Sample], extension: str, encode: Callable[[Sample], bytes]
) -> None:
    tars = [tarfile.open(folder / f"{shard}.tar", "w") for shard in range(SHARDS)]  # noqa: SIM115
    for index, (stem, sample, data) in enumerate(each_once(samples, encode)):
        for suffix, content in ((extension, data), ("target", sample.target.tobytes())):
            member = tarfile.TarInfo(f"{stem}.{suffix}")
            member.size = len(content)
            tars[index % SHARDS].addfile(member, io.BytesIO(content))
    for tar in tars:
        tar.close()
