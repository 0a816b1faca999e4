"""From payloads to volumes: what runs ahead of the step, on the host's threads or on the device.

A decoder takes a batch of payloads whenever it has room and hands out a batch of volumes whenever it
is asked, in the same order. Counts go through DALI on every device. Packed samples are inflated by
DALI on a GPU, and by threads of the host where there is none, which DALI has no operator for.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipelines.config import LoaderConfig
from pipelines.dataset import Split
from pipelines.footprint import READ_AHEAD, host_ahead
from pipelines.formats import Payload
from pipelines.formats.packed import PackedFormat
from pipelines.graph import define_counts_graph, define_packed_graph
from pipelines.packed import Packed
from pipelines.sample import SampleSpec
from pipelines.transforms import table_of

Source = Callable[[], Sequence[Payload]]
"""Hands out the next batch of payloads."""

Finish = Callable[[Payload], object]
"""What a reader thread is to do with a payload that it has read."""


class Decoder(Protocol):
    """What the loader asks for volumes.

    ahead: batches that are to be read before it asks for them.
    """

    ahead: int

    def admit(self) -> Sequence[Finish]:
        """For a batch that is about to be read: what is to be done with each of its payloads."""

    def forget(self) -> None:
        """Batches that were admitted are not to come: nobody works on them any more."""

    def run(self, into: torch.Tensor | None) -> torch.Tensor:
        """The next batch, (B, C, D, H, W) in channels-last memory; with `into`, there.

        It holds until the next call. DataError where a sample turns out to be damaged.
        """

    def close(self) -> None:
        """Free its buffers."""


class _DaliDecoder:
    """What has a pipeline of DALI, which asks for payloads itself and does everything with them."""

    ahead = READ_AHEAD

    def __init__(self, config: LoaderConfig) -> None:
        self._nothing: Sequence[Finish] = [lambda payload: None] * config.batch_size

    def admit(self) -> Sequence[Finish]:
        """See `Decoder`."""
        return self._nothing

    def forget(self) -> None:
        """See `Decoder`."""


class CountsDecoder(_DaliDecoder):
    """Counts through DALI's graph, on the CPU or on a GPU."""

    def __init__(self, source: Source, config: LoaderConfig, device: torch.device) -> None:
        super().__init__(config)

        def counts() -> list[npt.NDArray[np.int16]]:
            return [payload.counts for payload in source()]  # type: ignore[union-attr]

        self._fence = _Fence(device)
        self._pipeline = define_counts_graph(
            counts,
            batch_size=config.batch_size,
            threads=config.threads,
            prefetch=config.prefetch,
            device_id=device.index if device.type == "cuda" else None,
            apply_log=config.apply_log,
        )
        self._pipeline.build()

    def run(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`."""
        self._fence.wait()
        (output,) = self._pipeline.run()
        volume = torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 4, 1, 2, 3)
        if into is not None:
            volume = into.copy_(volume)
        elif volume.is_cuda:
            volume = volume.clone()
        self._fence.set()
        return volume

    def close(self) -> None:
        """See `Decoder`."""
        self._pipeline = None


class HostDecoder:
    """Packed samples on the host: the thread that reads one inflates it and looks its logarithms up.

    To hand a sample over to another thread would cost a tenth of what is done with it. The buffers,
    which are used again, are most of the memory that a loader of packed samples has.
    """

    def __init__(self, source: Source, spec: SampleSpec, config: LoaderConfig) -> None:
        self.ahead = host_ahead(config)
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

    def forget(self) -> None:
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
        packed: Packed = payload.packed  # type: ignore[union-attr]
        packed.fill(out, np.take(self._table, packed.table))
        if not self._apply_log:
            out /= out.mean(dtype=np.float64).astype(np.float32)


class DeviceDecoder(_DaliDecoder):
    """Packed samples on a GPU: DALI inflates them there, and torch gathers each voxel's values."""

    def __init__(self, source: Source, spec: SampleSpec, config: LoaderConfig, device: torch.device) -> None:
        super().__init__(config)
        self._source, self._apply_log = source, config.apply_log
        self._fence = _Fence(device)
        self._volume = torch.empty(config.batch_size, *spec.shape, device=device).permute(0, 4, 1, 2, 3)
        # Of the batches inside the pipeline: the bytes that a row's number has in each sample, and
        # the arrays, which DALI reads where they are.
        self._inside: deque[tuple[list[int], PackedArrays]] = deque()
        self._pipeline = define_packed_graph(
            self._arrays,
            batch_size=config.batch_size,
            threads=config.threads,
            prefetch=config.prefetch,
            device_id=device.index,
            apply_log=config.apply_log,
        )
        self._pipeline.build()

    def run(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`; `into` may be of any floating dtype."""
        self._fence.wait()
        volume = self._volume if into is None else into
        blocks, tables = self._pipeline.run()
        planes, _ = self._inside.popleft()
        for row, count in enumerate(planes):
            gather(
                torch.utils.dlpack.from_dlpack(blocks[row]),
                torch.utils.dlpack.from_dlpack(tables[row]),
                count,
                volume[row].permute(1, 2, 3, 0),
                by_mean=not self._apply_log,
            )
        self._fence.set()
        return volume

    def close(self) -> None:
        """See `Decoder`."""
        self._pipeline = None

    def _arrays(self) -> PackedArrays:
        packed: list[Packed] = [payload.packed for payload in self._source()]  # type: ignore[union-attr]
        arrays = arrays_of(packed)
        self._inside.append(([sample.planes for sample in packed], arrays))
        return arrays


PackedArrays = tuple[list[npt.NDArray[Any]], ...]
"""What the packed graph takes of a batch: see `define_packed_graph`."""


def arrays_of(batch: Sequence[Packed]) -> PackedArrays:
    """`batch` as the packed graph takes it, each table with a row of -1 behind it: NaN to be."""
    columns = []
    for packed in batch:
        first = int(packed.starts[0, 0])
        columns.append(
            (
                np.frombuffer(packed.content, np.uint8)[first:],
                (packed.starts.ravel() - first).astype(np.int32),
                packed.sizes.ravel().astype(np.int32),
                np.array([packed.voxels], np.int32),
                np.pad(packed.table, ((0, 1), (0, 0)), constant_values=-1),
            )
        )
    return tuple(map(list, zip(*columns, strict=True)))


def gather(
    blocks: torch.Tensor, table: torch.Tensor, planes: int, out: torch.Tensor, *, by_mean: bool
) -> None:
    """Write each voxel's values into `out` (D, H, W, C), of any floating dtype, contiguous.

    blocks: (chunks * planes, voxels of a chunk) uint8, the inflated blocks. table: (rows + 1, C)
    float32, whose last row is NaN: what a voxel gets whose row is not in the table, so that damage is
    noticed and nothing is read out of bounds. by_mean: divide by the mean of all values.
    """
    parts = blocks.view(-1, planes, blocks.shape[-1])
    rows = parts[:, 0].long()
    for plane in range(1, planes):
        rows |= parts[:, plane].long() << 8 * plane
    rows = rows.view(-1).clamp_(max=len(table) - 1)
    if by_mean:
        times = torch.bincount(rows, minlength=len(table))[:-1].double()
        table = table / (times @ table[:-1].double()).sum().div(rows.numel() * table.shape[-1]).float()
    torch.index_select(table.to(out.dtype), 0, rows, out=out.view(-1, table.shape[-1]))


def make_decoder(split: Split, source: Source, config: LoaderConfig, device: torch.device) -> Decoder:
    """What decodes the samples of `split` for `device`, as they come from `source`."""
    if split.form != PackedFormat.name:
        return CountsDecoder(source, config, device)
    if device.type == "cuda":
        return DeviceDecoder(source, split.spec, config, device)
    return HostDecoder(source, split.spec, config)


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
