"""Rows of this project's loader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.contract import WORKERS, Item, Job, Peer, Resume
from benchmarks.samples import KINDS, write_samples
from pipelines.dataset.open import open_folder
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.sample import Sample

_RESUME = Resume(True, True, "docs/architecture.md, The life of a run")


def project(kind: str) -> Peer:
    """Return the row of samples of `kind`, one of KINDS."""

    def write(folder: Path, samples: Sequence[Sample]) -> None:
        stems = (f"universe_{index:04d}" for index in range(len(samples)))
        write_samples(folder, kind, list(zip(stems, samples, strict=True)))

    return Peer(kind, ("nvidia.dali",), kind, write, _open, _RESUME)


def _open(job: Job) -> Iterator[Item]:
    options: dict[str, Any] = {"rank_slice": RankSlice(), "seed": 0, "shuffle": True, "ragged": "drop"}
    loader = Loader(open_folder(job.folder), LoaderConfig(1, WORKERS), device=torch.device("cpu"), **options)
    with contextlib.closing(loader):
        for epoch in range(job.epochs):
            for batch in loader.batches(epoch):
                yield batch.volume, batch.target


_FIRST = sorted(KINDS, key=lambda kind: not kind.startswith("packed"))
"""The table compares all rows with the first, the packed format's default."""

PEERS = [project(kind) for kind in _FIRST if kind != "tfrecord"]
