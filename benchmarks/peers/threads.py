"""Rows of libraries that load in threads of one process: Grain and SPDL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.contract import AHEAD, WORKERS, Item, Job, Peer, Resume
from benchmarks.peers.torch_loaders import read_npy, write_npy
from benchmarks.peers.volumes import Counts, Volumes, batches_of, blosc2_bytes, read_blosc2, write_files
from pipelines.sample import Sample

Read = Callable[[Path, int], tuple[Counts, Any]]


def _write_blosc2(folder: Path, samples: Sequence[Sample]) -> None:
    write_files(folder, samples, blosc2_bytes)


def _read_blosc2(folder: Path, index: int) -> tuple[Counts, Any]:
    counts = read_blosc2((folder / f"{index:04d}.counts").read_bytes())
    return counts, np.load(folder / "targets.npy", mmap_mode="r")[index]


def _filling(read: Read, job: Job) -> tuple[Volumes, Callable[[int], tuple[int, Any]]]:
    volumes = Volumes(job.size, planar=read is _read_blosc2, processes=False)

    def fill(index: int) -> tuple[int, Any]:
        counts, target = read(job.folder, int(index))
        return volumes.fill(counts), target

    return volumes, fill


def _open_grain(read: Read, job: Job) -> Iterator[Item]:
    import grain

    volumes, fill = _filling(read, job)
    options = grain.ReadOptions(num_threads=WORKERS, prefetch_buffer_size=AHEAD * WORKERS)
    indices = grain.MapDataset.range(job.samples).shuffle(seed=0).repeat(job.epochs)
    return batches_of(indices.map(fill).to_iter_dataset(options), volumes)


def _open_spdl(read: Read, job: Job) -> Iterator[Item]:
    from spdl.pipeline import PipelineBuilder

    volumes, fill = _filling(read, job)
    builder = PipelineBuilder().add_source(job.order()).pipe(fill, concurrency=WORKERS).add_sink(AHEAD)
    pipeline = builder.build(num_threads=WORKERS)
    with pipeline.auto_stop():
        yield from batches_of(pipeline, volumes)


_GRAIN = Resume(
    True, True, "Grain, DatasetIterator.get_state; other ranks: grain.experimental.ElasticIterator"
)
_SPDL = Resume(False, False, "SPDL's Pipeline has no state")

PEERS = [
    Peer("Grain, npy", ("grain",), "npy_pairs", write_npy, partial(_open_grain, read_npy), _GRAIN),
    Peer(
        "Grain, Blosc2 zstd",
        ("grain", "blosc2"),
        "blosc2",
        _write_blosc2,
        partial(_open_grain, _read_blosc2),
        _GRAIN,
    ),
    Peer("SPDL, npy", ("spdl.pipeline",), "npy_pairs", write_npy, partial(_open_spdl, read_npy), _SPDL),
    Peer(
        "SPDL, Blosc2 zstd",
        ("spdl.pipeline", "blosc2"),
        "blosc2",
        _write_blosc2,
        partial(_open_spdl, _read_blosc2),
        _SPDL,
    ),
]
