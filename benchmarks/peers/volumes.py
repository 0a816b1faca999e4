"""Parts that the peers' rows share: logarithms, reused volumes, hand-over from workers, Blosc2."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from benchmarks.peers.contract import AHEAD, WORKERS, Item, Job
from pipelines.sample import REDSHIFTS, Sample

Counts = npt.NDArray[np.int16]
T = TypeVar("T")

CHANNELS = len(REDSHIFTS)
_BLOCK = 1 << 16
"""Voxels of a block, which stays in a core's cache between the cast and the logarithm."""

_DEPTH = AHEAD + 2
"""Batches of a worker: those ahead, one that is filled, and one that is in use."""


def log_counts(counts: Counts, out: npt.NDArray[np.float32]) -> None:
    """Write log(count + 1) of `counts` to `out`, both flat and of the same length."""
    for start in range(0, len(counts), _BLOCK):
        block = out[start : start + _BLOCK]
        block[...] = counts[start : start + _BLOCK]
        np.log1p(block, out=block)


class Volumes:
    """Float32 volumes in reused memory, which workers fill in place and name by a number.

    A DataLoader otherwise allocates shared memory for each batch, and the kernel clears it.

    Args:
        size: Edge in voxels.
        planar: Counts are stored as (C, D, H, W), otherwise as (D, H, W, C).
        processes: Workers are processes, otherwise threads.
        batch: Samples of a batch.
    """

    def __init__(self, size: int, *, planar: bool, processes: bool, batch: int = 1) -> None:
        self._planar = planar
        shape = (CHANNELS, size, size, size) if planar else (size, size, size, CHANNELS)
        self._depth = _DEPTH * batch
        self._memory = torch.zeros(WORKERS * self._depth, *shape)
        if processes:
            self._memory.share_memory_()
        self._turns = itertools.count()
        self._free: SimpleQueue[int] = SimpleQueue()
        for number in range(len(self._memory)):
            self._free.put(number)

    def fill(self, counts: Counts) -> int:
        """Write the logarithms of `counts` to a free volume; return its number."""
        if worker := get_worker_info():
            # A process has its own volumes, in turns: a DataLoader takes its batches in order.
            number = worker.id * self._depth + next(self._turns) % self._depth
        else:
            # A thread may be late by any number of batches.
            number = self._free.get()
        log_counts(counts.reshape(-1), self._memory[number].numpy().reshape(-1))
        return number

    def batch(self, number: int) -> torch.Tensor:
        """Return a filled volume as a batch (1, 4, D, H, W)."""
        volume = self._memory[number]
        return (volume if self._planar else volume.permute(3, 0, 1, 2))[None]

    def release(self, number: int) -> None:
        """Let a thread fill a volume again."""
        self._free.put(number)


def batches_of(loader: Any, volumes: Volumes) -> Iterator[Item]:
    """Yield the batches of a `loader` of pairs (number of a volume, target)."""
    for number, target in loader:
        yield volumes.batch(number), target
        volumes.release(number)


def same(item: T) -> T:
    """Return `item`: a collate function for items that are batches."""
    return item


def only(items: Sequence[T]) -> T:
    """Return the one of `items`: a collate function for batches of one that were filled in place."""
    (item,) = items
    return item


class Filled(Dataset[tuple[int, Any]]):
    """Data set of samples by index, of which workers fill volumes."""

    def __init__(self, read: Callable[[int], tuple[Counts, Any]], volumes: Volumes) -> None:
        self._read, self._volumes = read, volumes

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """Return the number of a volume, and the target."""
        counts, target = self._read(index)
        return self._volumes.fill(counts), target


def filled_batches(job: Job, read: Callable[[int], tuple[Counts, Any]], *, planar: bool) -> Iterator[Item]:
    """Yield batches of a DataLoader over `read(index)`, with reused shared memory."""
    volumes = Volumes(job.size, planar=planar, processes=True)
    loader = DataLoader(
        Filled(read, volumes),
        batch_size=None,
        sampler=job.order(),
        num_workers=WORKERS,
        prefetch_factor=AHEAD,
        collate_fn=same,
    )
    return batches_of(loader, volumes)


def each_once(samples: Sequence[Sample], encode: Callable[[Sample], T]) -> Iterator[tuple[str, Sample, T]]:
    """Yield for each sample its name, itself and `encode(sample)`, computed once for repeated counts."""
    encoded: dict[int, T] = {}
    for index, sample in enumerate(samples):
        if id(sample.counts) not in encoded:
            encoded[id(sample.counts)] = encode(sample)
        yield f"{index:04d}", sample, encoded[id(sample.counts)]


def planar(sample: Sample) -> Counts:
    """Return the counts as (C, D, H, W)."""
    return np.ascontiguousarray(sample.counts.transpose(3, 0, 1, 2))


def raw(sample: Sample) -> bytes:
    """Return the bytes of the counts."""
    return sample.counts.tobytes()


def read_raw(data: bytes) -> Counts:
    """Return the counts of `raw`."""
    return np.frombuffer(data, np.int16)


def blosc2_bytes(sample: Sample) -> bytes:
    """Return planar counts compressed by Blosc2: bytes shuffled, zstd at the highest level."""
    import blosc2

    return bytes(
        blosc2.compress2(
            planar(sample), codec=blosc2.Codec.ZSTD, clevel=9, filters=[blosc2.Filter.SHUFFLE], typesize=2
        )
    )


def read_blosc2(data: bytes) -> Counts:
    """Return the planar counts of `blosc2_bytes`, flat."""
    import blosc2

    return np.frombuffer(blosc2.decompress2(data, nthreads=1), np.int16)


def write_files(folder: Path, samples: Sequence[Sample], encode: Callable[[Sample], bytes]) -> None:
    """Write `encode(sample)` to a file each, and all targets to one."""
    for stem, _, data in each_once(samples, encode):
        (folder / f"{stem}.counts").write_bytes(data)
    np.save(folder / "targets.npy", np.stack([sample.target for sample in samples]))
