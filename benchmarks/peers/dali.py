"""Rows of DALI's own readers, with a table of logarithms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.peers.contract import AHEAD, WORKERS, Item, Job, Peer, Resume
from benchmarks.peers.tars import SHARDS, write_raw
from benchmarks.peers.torch_loaders import write_npy
from benchmarks.peers.volumes import CHANNELS
from pipelines.loading.transforms import lookup_node
from pipelines.sample import PARAMETERS

_RESUME = Resume(
    True, False, "DALI, Advanced topics, Checkpointing: the state of each pipeline, with its shard_id"
)


def _run(read: Callable[[], tuple[Any, Any]]) -> Iterator[Item]:
    """Yield batches of a pipeline whose samples are `read()`: counts (D, H, W, C) and target."""
    from nvidia.dali import pipeline_def

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=1, num_threads=WORKERS, device_id=None, prefetch_queue_depth=AHEAD, exec_dynamic=False
    )
    def samples() -> Any:
        counts, target = read()
        return lookup_node(counts, apply_log=True), target

    pipeline = samples()
    pipeline.build()
    while True:
        volume, target = (torch.utils.dlpack.from_dlpack(output.as_tensor()) for output in pipeline.run())
        yield volume.permute(0, 4, 1, 2, 3), target


def _open_numpy(job: Job) -> Iterator[Item]:
    from nvidia.dali import fn

    names = [f"{index:04d}" for index in np.random.default_rng(0).permutation(job.samples)]

    def read() -> tuple[Any, Any]:
        files = ([str(job.folder / f"{name}_{part}.npy") for name in names] for part in ("data", "label"))
        counts, target = (fn.readers.numpy(files=each) for each in files)
        return counts, target

    return _run(read)


def _open_webdataset(job: Job) -> Iterator[Item]:
    from nvidia.dali import fn, types

    def read() -> tuple[Any, Any]:
        counts, target = fn.readers.webdataset(
            paths=[str(job.folder / f"{shard}.tar") for shard in range(SHARDS)],
            ext=["counts", "target"],
            random_shuffle=True,
            initial_fill=AHEAD * WORKERS,
            missing_component_behavior="error",
        )
        counts = fn.reinterpret(counts, dtype=types.INT16, shape=[job.size, job.size, job.size, CHANNELS])
        return counts, fn.reinterpret(target, dtype=types.FLOAT, shape=[len(PARAMETERS)])

    return _run(read)


PEERS = [
    Peer("DALI numpy reader", ("nvidia.dali",), "npy_pairs", write_npy, _open_numpy, _RESUME),
    Peer("DALI webdataset reader, raw", ("nvidia.dali",), "tar_raw", write_raw, _open_webdataset, _RESUME),
]
