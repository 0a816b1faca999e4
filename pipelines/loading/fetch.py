"""Fetching ahead of the reader threads: requests in flight hide the latency of remote storage.

The plan says which samples come next. Threads that wait for storage read their payloads, so that the reader
threads find them in memory and only decode.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import DataError, UnreadableError
from pipelines.formats.payload import Payload
from pipelines.loading.reader import Reader
from pipelines.plan import Indices
from pipelines.storage.base import Layer, Result, Storage
from pipelines.storage.location import Location
from pipelines.storage.requests import COUNTS

Fetched: TypeAlias = Future[tuple[int, Payload]]
"""The index that is read, and the payload; see `Reader.payload`."""

MAX_AHEAD = 64
"""Samples that are fetched ahead at most, unless the setting is larger."""

_MAX_BYTES = 256 << 20
"""Bytes of these samples at most."""

_FIRST_AHEAD = 8
"""Samples that are fetched ahead before anything is measured."""

_MARGIN = 1.5
"""Samples in flight for one that the mean latency needs: latencies vary."""

_MAX_JOINED, _MAX_GAP = 8 << 20, 2 * 512
"""Bytes of a request for several samples, and between two of them (a header of the tar), at most."""

_WEIGHT = 0.1
"""Weight of the latest measurement in a moving average."""


class FetchedStep(NamedTuple):
    """A step of the plan whose samples are being fetched; see `_InFlightStep.upcoming` in loader.py."""

    upcoming: Indices
    samples: Sequence[Fetched]


class Fetcher:
    """Samples of the plan, fetched ahead.

    Args:
        reader: Reads the samples.
        ahead: Samples to fetch ahead; None to choose from the measured latency and rate.
        initializer: Called in each thread.
    """

    def __init__(self, reader: Reader, ahead: int | None, initializer: Callable[[], None]) -> None:
        self._reader, self._fixed = reader, ahead is not None
        self._most = ahead or max(1, min(MAX_AHEAD, _MAX_BYTES // _sample_bytes(reader)))
        self._ahead = ahead or min(self._most, _FIRST_AHEAD)
        self._threads = ThreadPoolExecutor(self._most, "fetch", initializer)
        self._steps: deque[FetchedStep] = deque()
        self._latency = self._interval = 0.0
        self._taken, self._throttled = math.nan, COUNTS.throttled

    def take(self, planned: Iterator[Indices]) -> FetchedStep:
        """Return the next step of `planned`, and start to fetch further ones."""
        pending = sum(len(step.samples) for step in self._steps)
        if 2 * pending <= self._ahead:
            # Many at a time, for neighbours of one shard to be among them.
            self._start(planned, self._ahead - pending)
        step = self._steps.popleft()
        if not self._fixed:
            self._adapt(step)
        return step

    def clear(self) -> None:
        """Discard what is being fetched."""
        wait([sample for step in self._steps for sample in step.samples if not sample.cancel()])
        self._steps.clear()
        self._taken = math.nan

    def close(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _start(self, planned: Iterator[Indices], count: int) -> None:
        """Start to fetch at least `count` samples, and at least one step."""
        steps: list[Indices] = []
        while not steps or sum(len(upcoming[0]) for upcoming in steps) < count:
            steps.append(next(planned))
        indices = [index for upcoming in steps for index in upcoming[0].tolist()]
        samples: list[Fetched] = []
        for run in self._runs(indices):
            futures: list[Fetched] = [Future() for _ in run]
            fetch = self._threads.submit(self._fetch, run, futures)
            # Those of a fetch that `close` cancels: a reader thread may wait for them.
            fetch.add_done_callback(partial(_cancel, futures))
            samples += futures
        position = 0
        for upcoming in steps:
            self._steps.append(FetchedStep(upcoming, samples[position : position + len(upcoming[0])]))
            position += len(upcoming[0])

    def _runs(self, indices: Sequence[int]) -> list[list[int]]:
        """Return `indices` in their order, with those together that one request can bring."""
        split, runs, read = self._reader.split, list[list[int]](), 0
        for index in indices:
            before, length = runs[-1][-1] if runs else -1, 0
            if split.sharded and self._reader.slab is None and index >= 0:
                offset, length, _ = split.member_extents[index].item()
                end = sum(split.member_extents[before].item()[:2])
                close = before >= 0 and 0 <= offset - end <= _MAX_GAP and read + length <= _MAX_JOINED
                if close and split.files(index) == split.files(before):
                    runs[-1].append(index)
                    read += length
                    continue
            runs.append([index])
            read = length
        return runs

    def _fetch(self, run: Sequence[int], futures: Sequence[Fetched]) -> None:
        """Read the samples `run`, which follow each other in a shard if there are several."""
        start = time.monotonic()
        try:
            split = self._reader.split
            if len(run) > 1:
                # Otherwise the reader decides about each sample.
                with contextlib.suppress(DataError):
                    split = _prefetched(split, run)
            for index, future in zip(run, futures, strict=True):
                if future.set_running_or_notify_cancel():
                    future.set_result(self._reader.payload(index, split=split))
        except BaseException as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        taken = time.monotonic() - start
        self._latency += (_WEIGHT if self._latency else 1.0) * (taken - self._latency)

    def _adapt(self, step: FetchedStep) -> None:
        """Choose how many samples to fetch ahead: those that are used up while one is being fetched."""
        now, samples, throttled = time.monotonic(), len(step.samples), COUNTS.throttled
        if throttled > self._throttled:
            self._ahead = max(2 * samples, self._ahead // 2)
        elif all(sample.done() for sample in step.samples):
            interval = (now - self._taken) / samples
            if interval > 0:  # False for NaN.
                self._interval += (_WEIGHT if self._interval else 1.0) * (interval - self._interval)
            if self._interval:
                needed = math.ceil(_MARGIN * self._latency / self._interval) + samples
                self._ahead = max(2 * samples, min(needed, self._most))
        else:
            self._ahead = min(2 * self._ahead, self._most)
        self._taken, self._throttled = now, throttled


def _cancel(futures: Sequence[Fetched], _: Future[Any]) -> None:
    """Cancel those of `futures` that have no result."""
    for future in futures:
        future.cancel()


@dataclass(frozen=True)
class _Excerpt(Layer):
    """Parts of the file at `path`, and `inner` for everything else.

    Attributes:
        contents: The parts by (offset, length).
    """

    path: Location
    contents: Mapping[tuple[int, int], bytes]

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        content = self.contents.get((offset, length)) if path == self.path else None
        return self.inner.read_range(path, offset, length, direct=direct) if content is None else content

    def retry_damaged(self, read: Callable[[Storage], Result]) -> Result:
        """See `Storage`."""
        try:
            return read(self)
        except UnreadableError:
            raise
        except DataError:
            COUNTS.retries += 1
            return self.inner.retry_damaged(read)


def _sample_bytes(reader: Reader) -> int:
    """Return the mean length of what is read of a sample in bytes, at most."""
    split, slab = reader.split, reader.slab
    length = int(split.member_extents["bytes"].mean()) if split.sharded and len(split) else split.spec.bytes
    return length if slab is None else -(-length // slab.count)


def _prefetched(split: SampleDataset, run: Sequence[int]) -> SampleDataset:
    """Return `split` with the samples `run` in memory, which follow each other in one shard."""
    path, extents = split.files(run[0])[0], [split.member_extents[index].item()[:2] for index in run]
    contents = split.storage.read_ranges(path, extents)
    return replace(split, storage=_Excerpt(split.storage, path, dict(zip(extents, contents, strict=True))))
