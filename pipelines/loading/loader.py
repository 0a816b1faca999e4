"""Batches in the planned order: reader threads feed a decoder, which works ahead, torch takes its output.

The stream of steps runs on across the ends of epochs, so that the first batch of an epoch is as
ready as any other. A loader's whole position is (epoch, step): nothing of a decoder need be saved.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipelines.dataset.dataset import SampleDataset
from pipelines.formats.base import CountsPayload, Payload
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.format import PackedFormat, packed_payload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.decoders import Finish, make_decoder
from pipelines.loading.reader import Reader
from pipelines.plan import Indices, Ragged, RankSlice, plan_epoch
from pipelines.sample import PARAMETERS, Batch, Sample


@dataclass(frozen=True, slots=True)
class _Planned:
    """A step on its way: whose samples, and what the reader threads make of them."""

    epoch: int
    step: int
    index: Indices
    payloads: list[Future[tuple[int, Payload]]]


class Loader:
    """One rank's batches of `split`, on `device`.

    split: what is read.
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
    ) -> None:
        """See `plan_epoch` for `seed`, `shuffle` and `ragged`; UserError where the plan is empty.

        `rank_slice` is of those that read `split`; where that is a share, the others read other shares, in
        as many steps.
        """
        self.split = split
        self._reader = Reader(split, config.on_bad_sample, direct_io=config.direct_io)
        self._substitutes = ragged == "drop"
        self._rank_slice, self._device = rank_slice, device
        global_batch = config.batch_size * rank_slice.count
        # The smallest share sets the pace in training, the largest where every sample must be seen.
        smallest, largest = split.total // split.num_partitions, -(-split.total // split.num_partitions)
        steps = smallest // global_batch if ragged == "drop" else -(-largest // global_batch)
        self._plan = lambda epoch: plan_epoch(
            len(split),
            global_batch=global_batch,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
            ragged=ragged,
            steps=steps,
        )
        self._steps = len(self._plan(0))
        self._stream = self._steps_from(0, 0)
        self._next = (0, 0)
        self._reading: deque[_Planned] = deque()
        self._running: deque[_Planned] = deque()
        self._readers = ThreadPoolExecutor(config.threads, thread_name_prefix="reader")
        self._decoder = make_decoder(split, self._feed, self._rows_from, config, device)

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        return self._steps

    @property
    def skipped(self) -> dict[str, str]:
        """The faults of the samples that this loader has passed over so far, by path."""
        # A copy: reader threads go on writing there.
        return dict(self._reader.skipped)

    def batches(self, epoch: int, first_step: int = 0, into: Batch | None = None) -> Iterator[Batch]:
        """The batches of `epoch` from `first_step` on; with `into`, each copied into its tensors.

        A batch holds until the next one is asked for. DataError names a sample that cannot be read.
        """
        if (epoch, first_step) != self._next:
            self._seek(epoch, first_step)
        for step in range(first_step, self._steps):
            self._next = (epoch, step + 1) if step + 1 < self._steps else (epoch + 1, 0)
            yield self._batch(epoch, step, into)

    def raise_if_damaged(self, index: npt.NDArray[np.int64]) -> None:
        """Raise the DataError of the first sample among `index` that is not sound, if one is not."""
        for sample in index[index >= 0].tolist():
            self.split.read(sample)

    def close(self) -> None:
        """Stop the threads and free the buffers."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()

    def _seek(self, epoch: int, step: int) -> None:
        """Go on from there; what is on its way now is not to come."""
        self._stream = self._steps_from(epoch, step)
        wait([payload for planned in self._reading for payload in planned.payloads if not payload.cancel()])
        self._reading.clear()
        self._decoder.seek(epoch, step)

    def _rows_from(self, epoch: int, step: int) -> Iterator[Indices]:
        """This shard's samples, (steps, B), of the rest of that epoch, then of each one after it."""
        while True:
            yield self._rank_slice.select(self._plan(epoch))[step:]
            epoch, step = epoch + 1, 0

    def _steps_from(self, epoch: int, step: int) -> Iterator[tuple[int, int, Indices]]:
        """(epoch, step, this shard's samples) from there on, without end."""
        for rows in self._rows_from(epoch, step):
            for at, row in enumerate(rows, step):
                yield epoch, at, row
            epoch, step = epoch + 1, 0

    def _feed(self) -> list[Payload]:
        """The next batch of payloads for the decoder, which calls this whenever it has room."""
        while len(self._reading) <= self._decoder.ahead:
            epoch, step, index = next(self._stream)
            rows = zip(index.tolist(), self._decoder.admit(), strict=True)
            payloads = [self._readers.submit(self._read, *row) for row in rows]
            self._reading.append(_Planned(epoch, step, index, payloads))
        planned = self._reading.popleft()
        self._running.append(planned)
        return [payload.result()[1] for payload in planned.payloads]

    def _read(self, index: int, finish: Finish) -> tuple[int, Payload]:
        """In a reader thread: which sample was read for `index`, and its payload."""
        read, payload = self._reader.payload(index) if index >= 0 else (index, self._filling)
        finish(payload)
        return read, payload

    @functools.cached_property
    def _filling(self) -> Payload:
        """What stands in a row that only fills the batch up: one particle in every voxel.

        No sample of the split, which may be a share that has none.
        """
        sample = Sample(np.ones(self.split.spec.shape, np.int16), np.zeros(len(PARAMETERS), np.float32))
        if self.split.format_name == PackedFormat.name:
            return packed_payload(
                self.split.root, b"".join(encode(sample)), self.split.spec, fully_validate=False
            )
        return CountsPayload(sample.counts, sample.target)

    def _batch(self, epoch: int, step: int, into: Batch | None) -> Batch:
        """The output for `step` of `epoch`; what was in flight for an earlier position is passed over."""
        while True:
            volume = self._run(into.volume if into else None)
            planned = self._running.popleft()
            if (planned.epoch, planned.step) == (epoch, step):
                return self._take(volume, planned, into)

    def _run(self, into: torch.Tensor | None) -> torch.Tensor:
        try:
            return self._decoder.run(into)
        except RuntimeError:
            # DALI's errors name no file; reading the same samples on the host does. It may be ahead.
            for planned in (*self._running, *self._reading):
                self.raise_if_damaged(planned.index)
            raise

    def _take(self, volume: torch.Tensor, planned: _Planned, into: Batch | None) -> Batch:
        read, payloads = zip(*(payload.result() for payload in planned.payloads), strict=True)
        target = torch.from_numpy(np.stack([payload.target for payload in payloads]))
        if self._device.type == "cuda":
            # From pinned memory a copy waits for the stream, and otherwise the host does; torch gives that
            # memory to nobody else before the copy is done.
            target = target.pin_memory()
        if into is not None:
            target = into.target.copy_(target, non_blocking=True)
        else:
            target = target.to(self._device, non_blocking=True)
        return Batch(volume, target, self._index(planned.index, np.array(read)))

    def _index(self, asked: Indices, read: Indices) -> Indices:
        """Which sample each row is: what was asked for, but for those that were passed over."""
        if self._substitutes:
            return np.where(asked >= 0, read, asked)
        return np.where(asked == read, asked, -1)
