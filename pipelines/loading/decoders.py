"""From payloads to volumes: what runs ahead of the step, on the host's threads or on the device.

A decoder takes a batch of payloads whenever it has room and hands out a batch of volumes whenever it
is asked, in the same order. Counts go through DALI on every device. Packed samples are inflated by
DALI on a GPU, and by threads of the host where there is none, which DALI has no operator for.
"""

from __future__ import annotations

import functools
import itertools
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import ConfigError
from pipelines.formats.base import CountsPayload, Payload
from pipelines.formats.npy import Npy
from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.format import PackedFormat
from pipelines.formats.packed.gather_gpu import PackedArrays, arrays_of, gather
from pipelines.loading.config import LoaderConfig
from pipelines.loading.dali_graphs import (
    GraphSettings,
    define_counts_graph,
    define_files_graph,
    define_packed_graph,
)
from pipelines.loading.transforms import table_of
from pipelines.plan import Indices
from pipelines.sample import SampleSpec

_READ_AHEAD = 2
"""Batches that are being read before DALI asks for them."""

NextPayloads = Callable[[], Sequence[Payload]]
"""Hands out the next batch of payloads."""

Rows = Callable[[int, int], Iterator[Indices]]
"""The samples, (steps, B), from (epoch, step) to the end of that epoch, then of each one after it."""

Finish = Callable[[Payload], object]
"""What a reader thread is to do with a payload that it has read."""


class Decoder(Protocol):
    """What the loader asks for volumes.

    ahead: batches that are to be read before it asks for them.
    """

    ahead: int

    def admit(self) -> Sequence[Finish]:
        """For a batch that is about to be read: what is to be done with each of its payloads."""

    def seek(self, epoch: int, step: int) -> None:
        """The next batch is that one: those that were admitted are not to come, and nobody works on them."""

    def run(self, into: torch.Tensor | None) -> torch.Tensor:
        """The next batch, (B, C, D, H, W) in channels-last memory; with `into`, there.

        It holds until the next call. DataError where a sample turns out to be damaged.
        """

    def close(self) -> None:
        """Free its buffers."""


class _DaliDecoder:
    """What has a pipeline of DALI, which does everything with the payloads and works ahead."""

    ahead = _READ_AHEAD
    _pipeline: Any

    def __init__(self, config: LoaderConfig, device: torch.device) -> None:
        self._nothing: Sequence[Finish] = [lambda payload: None] * config.batch_size
        self._fence = _Fence(device)
        self._settings = GraphSettings(
            config.batch_size,
            config.threads,
            config.prefetch,
            device.index if device.type == "cuda" else None,
            config.apply_log,
        )

    def admit(self) -> Sequence[Finish]:
        """See `Decoder`."""
        return self._nothing

    def seek(self, epoch: int, step: int) -> None:
        """See `Decoder`; what the pipeline has asked for comes, and is passed over."""

    def close(self) -> None:
        """See `Decoder`."""
        self._pipeline = None

    def _counts(self, into: torch.Tensor | None) -> torch.Tensor:
        """The next batch of a pipeline that puts out volumes."""
        self._fence.wait()
        (output,) = self._pipeline.run()
        volume = torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 4, 1, 2, 3)
        if into is not None:
            volume = into.copy_(volume)
        elif volume.is_cuda:
            volume = volume.clone()
        self._fence.set()
        return volume


class CountsDecoder(_DaliDecoder):
    """Counts through DALI's graph, on the CPU or on a GPU."""

    def __init__(self, source: NextPayloads, config: LoaderConfig, device: torch.device) -> None:
        super().__init__(config, device)

        def counts() -> list[npt.NDArray[np.int16]]:
            return [payload.counts for payload in source()]  # type: ignore[union-attr]

        self._fetches: Sequence[Finish] = [_fetch] * config.batch_size
        self._pipeline = define_counts_graph(counts, self._settings)
        self._pipeline.build()

    def admit(self) -> Sequence[Finish]:
        """See `Decoder`."""
        return self._fetches

    def run(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`."""
        return self._counts(into)


def _fetch(payload: Payload) -> None:
    """Have the kernel fetch a mapped file before DALI's threads come to it."""
    if isinstance(payload, CountsPayload) and payload.mapped is not None:
        payload.mapped.madvise(mmap.MADV_WILLNEED)


class FilesDecoder(_DaliDecoder):
    """Counts of .npy files that DALI reads itself, on a GPU past the host's memory.

    The payloads have told that headers and targets are sound; nobody touches their counts. A list of
    files is fixed in DALI, so that a pipeline is built for every epoch.
    """

    def __init__(
        self,
        split: SampleDataset,
        source: NextPayloads,
        rows: Rows,
        config: LoaderConfig,
        device: torch.device,
    ) -> None:
        super().__init__(config, device)
        self.ahead = _READ_AHEAD + config.prefetch
        self._split, self._source, self._rows = split, source, rows
        self.seek(0, 0)

    def seek(self, epoch: int, step: int) -> None:
        """See `Decoder`."""
        self._epochs, self._steps = self._rows(epoch, step), 0

    def run(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`."""
        self._source()
        if not self._steps:
            rows = next(self._epochs)
            # A row that only fills the batch up reads the first sample.
            files = [str(self._split.path(max(index, 0))) for index in rows.ravel().tolist()]
            self._fence.wait()
            self._pipeline = define_files_graph(files, self._settings)
            self._pipeline.build()
            self._steps = len(rows)
        self._steps -= 1
        return self._counts(into)


class HostDecoder:
    """Packed samples on the host: the thread that reads one inflates it and looks its logarithms up.

    To hand a sample over to another thread would cost a tenth of what is done with it. The buffers,
    which are used again, are most of the memory that a loader of packed samples has.
    """

    def __init__(self, source: NextPayloads, spec: SampleSpec, config: LoaderConfig) -> None:
        # A sample for each thread, and `prefetch` batches that are ready.
        self.ahead = config.prefetch + -(-config.threads // config.batch_size)
        self._source, self._apply_log = source, config.apply_log
        self._table = table_of(apply_log=config.apply_log)
        buffers = [torch.empty(config.batch_size, *spec.shape) for _ in range(self.ahead + 1)]
        # Torch gives way to other threads in every call, so that those made here cost nothing later.
        self._buffers = itertools.cycle(
            [(buffer.numpy(), buffer.permute(0, 4, 1, 2, 3)) for buffer in buffers]
        )
        self._admitted: deque[torch.Tensor] = deque()

    def admit(self) -> Sequence[Finish]:
        """See `Decoder`."""
        # The oldest buffer is the one that was handed out last time, and is free now.
        buffer, volume = next(self._buffers)
        self._admitted.append(volume)
        return [functools.partial(self._decode, out=out) for out in buffer]

    def seek(self, epoch: int, step: int) -> None:
        """See `Decoder`."""
        self._admitted.clear()

    def run(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`."""
        self._source()
        volume = self._admitted.popleft()
        return volume if into is None else into.copy_(volume)

    def close(self) -> None:
        """See `Decoder`."""
        self._admitted.clear()

    def _decode(self, payload: Payload, out: npt.NDArray[np.float32]) -> None:
        """Write the volume (D, H, W, C) of `payload` into `out`."""
        packed: PackedSample = payload.packed  # type: ignore[union-attr]
        packed.fill(out, np.take(self._table, packed.table))
        if not self._apply_log:
            out /= out.mean(dtype=np.float64).astype(np.float32)


class DeviceDecoder(_DaliDecoder):
    """Packed samples on a GPU: DALI inflates them there, and torch gathers each voxel's values."""

    def __init__(
        self, source: NextPayloads, spec: SampleSpec, config: LoaderConfig, device: torch.device
    ) -> None:
        super().__init__(config, device)
        self._source, self._apply_log = source, config.apply_log
        self._volume = torch.empty(config.batch_size, *spec.shape, device=device).permute(0, 4, 1, 2, 3)
        # Of the batches inside the pipeline: the samples, and their arrays, which DALI reads where they are.
        self._inside: deque[tuple[list[PackedSample], PackedArrays]] = deque()
        self._pipeline = define_packed_graph(self._arrays, self._settings)
        self._pipeline.build()

    def run(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`; `into` may be of any floating dtype."""
        self._fence.wait()
        volume = self._volume if into is None else into
        blocks, tables = self._pipeline.run()
        batch, _ = self._inside.popleft()
        for row, packed in enumerate(batch):
            gather(
                torch.utils.dlpack.from_dlpack(blocks[row]),
                torch.utils.dlpack.from_dlpack(tables[row]),
                volume[row].permute(1, 2, 3, 0),
                planes=packed.planes,
                total=packed.total,
                by_mean=not self._apply_log,
            )
        self._fence.set()
        return volume

    def _arrays(self) -> PackedArrays:
        packed: list[PackedSample] = [payload.packed for payload in self._source()]  # type: ignore[union-attr]
        arrays = arrays_of(packed)
        self._inside.append((packed, arrays))
        return arrays


def make_decoder(
    split: SampleDataset, source: NextPayloads, rows: Rows, config: LoaderConfig, device: torch.device
) -> Decoder:
    """What decodes the samples of `split` for `device`, as they come from `source`, in the order of `rows`.

    ConfigError where `config` asks for what that format or that device cannot have.
    """
    if config.gpu_direct:
        _check_direct(split, device)
        # What fills up the steps of a share without samples is in no file.
        if len(split):
            return FilesDecoder(split, source, rows, config, device)
    if split.format_name != PackedFormat.name:
        return CountsDecoder(source, config, device)
    if device.type == "cuda":
        return DeviceDecoder(source, split.spec, config, device)
    return HostDecoder(source, split.spec, config)


def _check_direct(split: SampleDataset, device: torch.device) -> None:
    if split.format_name != Npy.name:
        raise ConfigError(
            "loader.gpu_direct", True, f"takes npy samples, and {split.root} has {split.format_name}"
        )
    if device.type != "cuda":
        raise ConfigError("loader.gpu_direct", True, "takes samples to a GPU, and there is none to train on")


class _Fence:
    """Keeps DALI from using a buffer again that torch is still reading."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._set = False

    def set(self) -> None:
        """What torch has been asked for so far is what reads the buffer."""
        if self._event is not None:
            self._event.record()
            self._set = True

    def wait(self) -> None:
        """Until all of that is done."""
        if self._event is not None and self._set:
            self._event.synchronize()
