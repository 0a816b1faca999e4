"""Rows of this project's loader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.peers.contract import WORKERS, Item, Job, Peer, Resume
from benchmarks.samples import KINDS, folder_name, write_samples
from pipelines.dataset.open import open_folder
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice

_RESUME = Resume(True, True, "docs/architecture.md, The life of a run")


def _open(job: Job) -> Iterator[Item]:
    options: dict[str, Any] = {"rank_slice": RankSlice(), "seed": 0, "shuffle": True, "ragged": "drop"}
    loader = Loader(open_folder(job.folder), LoaderConfig(1, WORKERS), device=torch.device("cpu"), **options)
    with contextlib.closing(loader):
        for epoch in range(job.epochs):
            for batch in loader.batches(epoch):
                yield batch.volume, batch.target


# The table compares all rows with the first: the packed format's default.
PEERS = [
    Peer(kind, ("nvidia.dali",), folder_name(kind), partial(write_samples, kind), _open, _RESUME)
    for kind in sorted(KINDS, key=lambda kind: not kind.startswith("packed"))
    if kind != "tfrecord"
]
