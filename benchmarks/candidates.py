"""Candidates of the input benchmark: endless iterators, one item per delivered batch.

All deliver float32 logarithms (B, 4, size, size, size) in the same shuffled order.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import mmap
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.samples import framed
from pipelines.dataset.dataset import SampleDataset
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice, plan_epoch
from pipelines.storage.location import Location

_BLOCK = 4096
"""Block size of O_DIRECT reads that suits any disk."""

Item = tuple[torch.Tensor, npt.NDArray[np.float32]]


def planned(split: SampleDataset, batch_size: int, epoch: int) -> list[int]:
    """Return the samples of `epoch` in the order of all candidates, batch by batch."""
    plan = plan_epoch(len(split), global_batch=batch_size, seed=0, epoch=epoch, shuffle=True, ragged="drop")
    return plan.ravel().tolist()


def touch(volume: torch.Tensor) -> None:
    """Access a delivered volume (B, 4, D, H, W), so that it must exist."""
    assert volume[0, 0, 0, 0, 0].item() >= 0.0


@contextlib.contextmanager
def project_loader(
    split: SampleDataset, config: LoaderConfig, device: str = "cpu"
) -> Iterator[Iterator[int]]:
    """Yield batches of the project's loader, with targets, over endless epochs."""
    loader = Loader(
        split,
        config,
        rank_slice=RankSlice(),
        seed=0,
        shuffle=True,
        ragged="drop",
        device=torch.device(device),
    )

    def deliver() -> Iterator[int]:
        for batch in itertools.chain.from_iterable(map(loader.batches, itertools.count())):
            touch(batch.volume)
            yield len(batch.volume)

    with contextlib.closing(loader):
        yield deliver()


def dali_numpy(
    split: SampleDataset, batch_size: int, threads: int, *, direct: bool = False
) -> Generator[int, None, None]:
    """Yield batches of DALI's numpy reader with a table of logarithms, without targets.

    Its list of files is fixed, so each epoch has the order of the first.

    Args:
        direct: Bypass the page cache.
    """
    from nvidia.dali import fn, pipeline_def, types

    files = [str(split.path(index)) for index in planned(split, batch_size, epoch=0)]
    keys = np.arange(2**15)

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=2,
        exec_dynamic=False,
    )
    def samples() -> Any:
        counts = fn.readers.numpy(files=files, dont_use_mmap=direct, use_o_direct=direct)
        values = np.log1p(keys).astype(np.float32).tolist()
        return fn.lookup_table(counts, keys=keys.tolist(), values=values, dtype=types.FLOAT)

    pipeline = samples()
    pipeline.build()
    while True:
        (output,) = pipeline.run()
        touch(torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 4, 1, 2, 3))
        yield batch_size


class PlainNpy(Dataset[Item]):
    """Straightforward torch data set of .npy pairs."""

    def __init__(self, split: SampleDataset) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Item:
        """Return logarithms (D, H, W, 4) float32, and the target (4,) float32."""
        label, data = self._split.files(index)
        return torch.log1p(torch.from_numpy(np.load(data))), np.load(label)


class PlainGzip(Dataset[Item]):
    """Straightforward torch data set of the published files, with a known offset of the counts."""

    def __init__(self, split: SampleDataset) -> None:
        sample = split.read(0)
        self._split, self._target = split, sample.target.copy()
        self._start = framed(sample).index(sample.counts.tobytes())

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Item:
        """Return logarithms (D, H, W, 4) float32, and a constant target (4,), which is cheaper to read."""
        content = gzip.decompress(self._split.storage.read(self._split.path(index)))
        shape = self._split.spec.shape
        counts = np.frombuffer(content, np.int16, int(np.prod(shape)), self._start).reshape(shape)
        return torch.from_numpy(np.log1p(counts.astype(np.float32))), self._target


def plain_loader(
    dataset: Dataset[Item], split: SampleDataset, batch_size: int, *, workers: int = 2
) -> Generator[int, None, None]:
    """Yield batches of a DataLoader with an endless epoch, so that it works ahead across epochs too."""
    order = itertools.chain.from_iterable(planned(split, batch_size, epoch) for epoch in itertools.count())
    # Forked workers may crash if their parent has had threads, as those of earlier pipelines.
    context = "spawn" if workers else None
    loader = DataLoader(
        dataset, batch_size, sampler=order, num_workers=workers, multiprocessing_context=context
    )
    for volume, _ in loader:
        touch(volume.permute(0, 4, 1, 2, 3))
        yield len(volume)


def limit(
    split: SampleDataset, batch_size: int, threads: int, *, direct: bool = False
) -> Generator[int, None, None]:
    """Yield batches at the least cost of `split`'s bytes: `threads` threads read them and copy a volume.

    Reads go to reused memory, from the page cache or, with `direct`, bypassing it; the copy is a memcpy.
    """
    ready = torch.zeros(split.spec.shape)
    buffers = itertools.cycle([torch.zeros(batch_size, *split.spec.shape) for _ in range(3)])
    # O_DIRECT needs page-aligned memory, as mmap returns.
    room = int(bytes_read(split).max()) + 2 * _BLOCK
    scratch = itertools.cycle([mmap.mmap(-1, room) for _ in range(3 * batch_size)])

    def move(index: int, out: torch.Tensor, into: mmap.mmap) -> None:
        for path in split.files(index):
            offset, length = 0, split.storage.state(path).bytes
            if split.sharded:
                offset, length, _ = split.member_extents[index].item()
            _read(path, offset, length, into, direct=direct)
        np.copyto(out.numpy(), ready.numpy())

    ahead: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()
    order = itertools.chain.from_iterable(planned(split, batch_size, epoch) for epoch in itertools.count())
    with ThreadPoolExecutor(threads) as pool:
        while True:
            while len(ahead) < 3:
                out = next(buffers)
                rows = zip(itertools.islice(order, batch_size), out, scratch, strict=False)
                ahead.append((out, [pool.submit(move, *row) for row in rows]))
            out, moved = ahead.popleft()
            for future in moved:
                future.result()
            touch(out.permute(0, 4, 1, 2, 3))
            yield batch_size


def _read(path: Location, offset: int, length: int, into: mmap.mmap, *, direct: bool) -> None:
    """Read the whole blocks that contain `length` bytes at `offset` of `path`."""
    start = offset // _BLOCK * _BLOCK
    end = -(-(offset + length) // _BLOCK) * _BLOCK
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    descriptor = os.open(path, flags)
    try:
        filled = 0
        with memoryview(into) as view:
            while start + filled < offset + length:
                filled += os.preadv(descriptor, [view[filled : end - start]], start + filled)
    finally:
        os.close(descriptor)


def bytes_read(split: SampleDataset) -> npt.NDArray[np.int64]:
    """Return the bytes of each sample's files, or of its member in a shard."""
    if split.sharded:
        return split.member_extents["bytes"]
    sizes = [
        sum(split.storage.state(path).bytes for path in split.files(index)) for index in range(len(split))
    ]
    return np.array(sizes, np.int64)
