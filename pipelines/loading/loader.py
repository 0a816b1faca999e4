"""Batches in the planned order: plan, read (threads), decode, batch.

The steps of all epochs form one stream, so that the first batch of an epoch is prepared ahead like any
other. The state of a loader is its position (epoch, step) alone: a resume starts there, and nothing of
a decoder is saved.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import DataError
from pipelines.formats.payload import Payload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.decoder import OnRead
from pipelines.loading.decoders import make_decoder
from pipelines.loading.fetch import Fetched, Fetcher
from pipelines.loading.reader import Reader
from pipelines.loading.transforms import check_input
from pipelines.plan import Indices, Ragged, RankSlice, plan_epoch
from pipelines.sample import Batch, is_in_range
from pipelines.slab import Slab, shape_to_read

Agree: TypeAlias = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
"""Returns the elementwise maximum of an array over the ranks that share samples, which all must call it."""


class _InFlightStep(NamedTuple):
    """A step that is being read or decoded.

    Attributes:
        upcoming: Sample indices of this step and of the later ones of its epoch, (steps, B).
        on_read: For each sample the decoder's callback.
        reads: For each sample the index that was read (see `Reader.payload`) and its payload.
    """

    upcoming: Indices
    on_read: Sequence[OnRead]
    reads: list[Future[tuple[int, Payload]]]


def _run_as_batch() -> None:
    """Let this thread take a processor from no other one when it wakes up.

    Otherwise Linux interrupts the thread that has just started a read, the one that trains, even if another
    processor is idle, for as long as decoding a sample takes.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # A sandbox may forbid it.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Loader:
    """Batches of one rank.

    Args:
        split: Samples to load.
        config: Settings.
        rank_slice: This rank's part of each step, among the ranks that read `split`. If `split` is a
            partition, other ranks read the other partitions, in the same number of steps.
        seed, shuffle, ragged: See `plan_epoch`.
        device: Device of the batches.
        slab: Part of every sample that this rank loads; None for all of it. The ranks of a group, which load
            the slabs of the same samples, have equal `rank_slice`s.
        agree: Required with a slab if damaged samples are skipped, for all ranks of a group to skip the same.

    Raises:
        UserError: The samples do not fill one step, with `ragged` "drop".
        ConfigError: `config` requires another format or device.
    """

    def __init__(
        self,
        split: SampleDataset,
        config: LoaderConfig,
        *,
        rank_slice: RankSlice,
        seed: int,
        shuffle: bool,
        ragged: Ragged,
        device: torch.device,
        slab: Slab | None = None,
        agree: Agree | None = None,
    ) -> None:
        self.split, self.slab = split, slab
        skips = config.on_bad_sample == "skip"
        if slab is not None and skips and agree is None:
            raise ValueError("ranks that share samples cannot skip damaged ones without agreeing on them")
        # Unless samples are skipped, all ranks read the planned ones.
        self._agree = agree if skips else None
        self._reader = Reader(
            split, config.on_bad_sample, direct_io=config.direct_io, apply_log=config.apply_log, slab=slab
        )
        self._apply_log = config.apply_log
        self._rank_slice, self._ragged, self._device = rank_slice, ragged, device
        global_batch = config.batch_size * rank_slice.count
        # The smallest partition sets the number of steps in training, the largest where no sample is dropped.
        smallest, largest = split.total // split.num_partitions, -(-split.total // split.num_partitions)
        steps = smallest // global_batch if ragged == "drop" else -(-largest // global_batch)
        steps_of = functools.partial(plan_epoch, len(split), global_batch=global_batch, steps=steps)
        self._plan = functools.partial(steps_of, seed=seed, shuffle=shuffle, ragged=ragged)
        self._steps = len(self._plan(epoch=0))
        self._position = (0, 0)
        self._planned = self._steps_from(0, 0)
        self._reading: deque[_InFlightStep] = deque()
        self._decoding: deque[_InFlightStep] = deque()
        self._readers = ThreadPoolExecutor(config.threads, "reader", _run_as_batch)
        self._decoder = make_decoder(split, config, device, slab)
        ahead = config.requests_ahead
        self._fetcher: Fetcher | None = None
        if ahead or (ahead is None and split.storage.is_remote):
            self._fetcher = Fetcher(self._reader, ahead, _run_as_batch)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(D, H, W, C) of every volume."""
        return shape_to_read(self.split.spec, self.slab)

    def __len__(self) -> int:
        """Number of steps per epoch, the same on every rank."""
        return self._steps

    @property
    def skipped(self) -> dict[str, str]:
        """Faults of the samples skipped so far, by path."""
        # A copy, because reader threads add to the original.
        return dict(self._reader.skipped)

    def batches(self, epoch: int, first_step: int = 0, into: Batch | None = None) -> Iterator[Batch]:
        """Iterate over the batches of `epoch` from `first_step` on; each is valid until the next is taken.

        Args:
            epoch: Epoch of the plan.
            first_step: First step; not 0 when an epoch is resumed.
            into: Batch to whose tensors each batch is copied, for CUDA graphs.

        Raises:
            DataError: A sample cannot be read or decoded.
        """
        if (epoch, first_step) != self._position:
            self._seek(epoch, first_step)
        for step in range(first_step, self._steps):
            self._position = (epoch, step + 1) if step + 1 < self._steps else (epoch + 1, 0)
            volume, done = self._decode_next(into.volume if into else None)
            batch = self._batch(volume, done, into)
            # Last, because a thread that wakes up to read competes with this one for Python's lock.
            self._read_ahead()
            yield batch

    def raise_if_damaged(self, index: npt.NDArray[np.int64], *, largest: float = math.inf) -> None:
        """Read and validate the samples `index` on the host, padding (-1) excepted.

        Args:
            index: Samples.
            largest: Largest finite number of the network's input.

        Raises:
            DataError: A sample is damaged, or its input is not finite; names the first.
        """
        for i in index[index >= 0].tolist():
            if self.slab is not None:
                self.split.payload(i, slab=self.slab, fully_validate=True)
                continue
            counts = self.split.read(i).counts
            check_input(self.split.path(i), counts, apply_log=self._apply_log, largest=largest)

    def raise_if_out_of_range(self, index: npt.NDArray[np.int64]) -> None:
        """Raise DataError for the first of the valid samples `index` whose target is not within -1 to 1."""
        for i in index[index >= 0].tolist():
            target = self.split.payload(i, slab=self.slab).target
            if not is_in_range(target):
                fault = f"the loss is not finite, and the target {target.tolist()} is not within -1 to 1"
                raise DataError(self.split.path(i), fault, "fix the target, or lower the learning rate")

    def close(self) -> None:
        """Stop the threads and free the buffers."""
        if self._fetcher:
            self._fetcher.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        del self._decoder

    def _seek(self, epoch: int, step: int) -> None:
        """Continue from (epoch, step); discard everything in flight."""
        self._planned = self._steps_from(epoch, step)
        wait([read for reading in self._reading for read in reading.reads if not read.cancel()])
        if self._fetcher:
            self._fetcher.clear()
        self._reading.clear()
        self._decoder.reset()
        for _ in range(len(self._decoding)):
            self._decode_next(None)

    def _steps_from(self, epoch: int, step: int) -> Iterator[Indices]:
        """Yield `_InFlightStep.upcoming` for each step from there on, epoch after epoch, without end."""
        while True:
            indices = self._rank_slice.select(self._plan(epoch=epoch))
            for first in range(step, len(indices)):
                yield indices[first:]
            epoch, step = epoch + 1, 0

    def _decode_next(self, into: torch.Tensor | None) -> tuple[torch.Tensor, _InFlightStep]:
        """Decode as far ahead as intended; return the volumes of the oldest step."""
        while len(self._decoding) < self._decoder.depth:
            if not self._reading:
                self._read_ahead()
            step = self._reading[0]
            if self._agree is not None:
                self._read_the_same(step, self._agree)
            payloads = [read.result()[1] for read in step.reads]
            with self._naming_damaged():
                self._decoder.submit(payloads, step.upcoming)
            self._decoding.append(self._reading.popleft())
        with self._naming_damaged():
            volume = self._decoder.next(into)
        return volume, self._decoding.popleft()

    @contextlib.contextmanager
    def _naming_damaged(self) -> Iterator[None]:
        """Raise the DataError of a damaged sample in flight, if there is one, for a RuntimeError of the body.

        DALI's errors name no file, and may concern a later step: the samples are read again on the host.
        """
        try:
            yield
        except RuntimeError:
            for step in (*self._decoding, *self._reading):
                self.raise_if_damaged(step.upcoming[0])
            raise

    def _read_ahead(self) -> None:
        """Start reading as far ahead as intended."""
        while len(self._reading) < self._decoder.lookahead:
            self._reading.append(self._start_reading())

    def _start_reading(self) -> _InFlightStep:
        on_read = self._decoder.reserve()
        if self._fetcher:
            upcoming, fetched = self._fetcher.take(self._planned)
            reads = [self._readers.submit(self._take, *each) for each in zip(fetched, on_read, strict=True)]
        else:
            upcoming = next(self._planned)
            samples = zip(upcoming[0].tolist(), on_read, strict=True)
            reads = [self._readers.submit(self._read, *sample) for sample in samples]
        return _InFlightStep(upcoming, on_read, reads)

    def _read(self, index: int, on_read: OnRead, ahead: int = 0) -> tuple[int, Payload]:
        """Read one sample, in a reader thread; see `_InFlightStep.reads` and `Reader.payload`."""
        read, payload = self._reader.payload(index, ahead)
        on_read(payload)
        return read, payload

    @staticmethod
    def _take(fetched: Fetched, on_read: OnRead) -> tuple[int, Payload]:
        """Take a sample that is being fetched, in a reader thread; see `_InFlightStep.reads`."""
        read, payload = fetched.result()
        on_read(payload)
        return read, payload

    def _read_the_same(self, step: _InFlightStep, agree: Agree) -> None:
        """Read samples of `step` again where another rank has skipped more, until all ranks have the same."""
        planned = step.upcoming[0]
        while True:
            read = np.array([read.result()[0] for read in step.reads])
            ahead = (read - planned) % max(1, len(self.split))
            furthest, least = np.split(agree(np.concatenate([ahead, -ahead])), 2)
            if (furthest == -least).all():
                return
            for row in np.flatnonzero(ahead < furthest).tolist():
                sample = int(planned[row]), step.on_read[row], int(furthest[row])
                step.reads[row] = self._readers.submit(self._read, *sample)

    def _batch(self, volume: torch.Tensor, step: _InFlightStep, into: Batch | None) -> Batch:
        """Return the batch of `step`: its decoded `volume`, with targets and indices."""
        read, payloads = zip(*(read.result() for read in step.reads), strict=True)
        # Few calls of torch: each releases Python's lock, and waits for it while readers are busy.
        target = torch.from_numpy(np.array([payload.target for payload in payloads]))
        if self._device.type == "cuda":
            # Only from pinned memory is the copy asynchronous. Torch reuses that memory after the copy.
            target = target.pin_memory().to(self._device, non_blocking=True)
        if into:
            target = into.target.copy_(target, non_blocking=True)
        index = np.array(read)
        if self._ragged == "pad":
            # A score counts no sample twice: what was read in place of a damaged sample is left out.
            index = np.where(index == step.upcoming[0], index, -1)
        return Batch(volume, target, index)
