"""Decoders: batches of payloads, as the reader threads have read them, become batches of volumes.

The loader submits payloads and takes volumes, in the same order. Counts pass through a DALI graph on
every device. Packed samples are inflated by DALI on a GPU. DALI has no such operator for the CPU, so
there the reader threads decode them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import ConfigError
from pipelines.formats.npy import Npy
from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.gather_choice import choose_gather
from pipelines.formats.packed.gather_gpu import PackedArrays, arrays_of
from pipelines.formats.payload import CountsPayload, Payload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.dali_graphs import counts_node, define_pipeline, files_node, packed_nodes
from pipelines.loading.transforms import lookup_table
from pipelines.plan import Indices
from pipelines.sample import SampleSpec

_READ_AHEAD = 2
"""Batches that are read ahead of those in DALI."""

OnRead = Callable[[Payload], object]
"""Called in a reader thread with a payload that it has read."""


def as_torch(output: Any, device: torch.device) -> torch.Tensor:
    """Return a tensor that shares the memory of DALI's tensor `output`, on `device`.

    On a GPU not by DLPack: when such a tensor is freed, DALI waits for the whole device, which also fails
    while a CUDA graph is captured.
    """
    if device.type == "cuda":
        return torch.as_tensor(output, device=device)
    return torch.utils.dlpack.from_dlpack(output)


class Decoder(Protocol):
    """A queue with batches of payloads at its start and batches of volumes at its end.

    Attributes:
        depth: Batches to submit before the first is taken.
        lookahead: Batches to read ahead of those submitted.
    """

    depth: int
    lookahead: int

    def reserve(self) -> Sequence[OnRead]:
        """Reserve buffers for the next batch to be read; return one callback per sample."""

    def submit(self, payloads: Sequence[Payload], upcoming: Indices) -> None:
        """Add the batch that was reserved first.

        Args:
            payloads: Its samples, for which the callbacks have returned. The caller keeps them until the
                batch is taken.
            upcoming: Sample indices of this batch and of the later ones of its epoch, (steps, B).
        """

    def next(self, into: torch.Tensor | None) -> torch.Tensor:
        """Return the volumes of the batch that was submitted first; they are valid until the next call.

        Args:
            into: Tensor to write them to, and to return.

        Returns:
            Volumes (B, C, D, H, W) in channels-last memory format.
        """

    def reset(self) -> None:
        """Discard the batches that are reserved, but not submitted; their callbacks have returned."""


class _DaliDecoder:
    """Base of the decoders whose work is done by a DALI pipeline, ahead of `next` and in its own threads."""

    lookahead = _READ_AHEAD

    def __init__(self, config: LoaderConfig, device: torch.device) -> None:
        self.depth = config.prefetch
        self._config, self._device = config, device
        # Blocking: a thread that waits for it uses no CPU.
        self._output_read = torch.cuda.Event(blocking=True) if device.type == "cuda" else None

    def reserve(self) -> Sequence[OnRead]:
        """See `Decoder`."""
        return [self._on_read] * self._config.batch_size

    def next(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`."""
        (output,) = self._run()
        volume = as_torch(output.as_tensor(), self._device).permute(0, 4, 1, 2, 3)
        if into is not None:
            volume = into.copy_(volume)
        elif volume.is_cuda:
            volume = volume.clone()
        self._record_read()
        return volume

    def reset(self) -> None:
        """See `Decoder`."""

    @staticmethod
    def _on_read(payload: Payload) -> None:
        """Do nothing with a payload that has just been read."""

    def _start(self, define_nodes: Callable[[], Any]) -> None:
        """Replace the pipeline by one with the outputs that `define_nodes` returns."""
        self._wait_for_reads()
        self._pipeline = define_pipeline(define_nodes, self._config, self._device)
        self._pipeline.build()

    def _run(self) -> Any:
        """Return the next outputs of the pipeline, in memory that the next run reuses."""
        self._wait_for_reads()
        return self._pipeline.run()

    def _record_read(self) -> None:
        """Mark the point in torch's stream after which the outputs of the last run are no longer needed."""
        if self._output_read is not None:
            self._output_read.record()

    def _wait_for_reads(self) -> None:
        if self._output_read is not None:
            self._output_read.synchronize()


class CountsDecoder(_DaliDecoder):
    """Counts through DALI, on the CPU or on a GPU."""

    def __init__(self, config: LoaderConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._inputs: deque[list[npt.NDArray[np.int16]]] = deque()
        self._start(lambda: counts_node(self._inputs, device, apply_log=config.apply_log))

    def submit(self, payloads: Sequence[Payload], upcoming: Indices) -> None:
        """See `Decoder`; RuntimeError if a mapped file was cut off, as the access would end the process."""
        for payload in payloads:
            mapped = payload.mapped if isinstance(payload, CountsPayload) else None
            if mapped is not None and mapped.size() < len(mapped):
                raise RuntimeError("a file was cut off after it had been mapped into memory")
        self._inputs.append([payload.counts for payload in payloads])  # type: ignore[union-attr]

    @staticmethod
    def _on_read(payload: Payload) -> None:
        """Make the kernel read a mapped file before DALI's threads access it."""
        if isinstance(payload, CountsPayload) and payload.mapped is not None:
            with contextlib.suppress(OSError):  # The call is only a hint.
                payload.mapped.madvise(mmap.MADV_WILLNEED)


class FilesDecoder(_DaliDecoder):
    """Counts of .npy files that DALI reads itself, on a GPU directly into its memory.

    The payloads serve to validate headers and targets; their counts are not accessed. DALI's reader
    takes a fixed list of files, so that each epoch has a pipeline of its own.
    """

    def __init__(self, split: SampleDataset, config: LoaderConfig, device: torch.device) -> None:
        super().__init__(config, device)
        # The reader in the pipeline works ahead: it must find nothing that was not validated.
        self.depth, self.lookahead = 1, _READ_AHEAD + config.prefetch
        self._split = split
        self._steps_left = 0

    def submit(self, payloads: Sequence[Payload], upcoming: Indices) -> None:
        """See `Decoder`."""
        if not self._steps_left:
            # A padding row reads the first sample.
            files = [str(self._split.path(max(index, 0))) for index in upcoming.ravel().tolist()]
            self._start(lambda: files_node(files, self._device, apply_log=self._config.apply_log))
            self._steps_left = len(upcoming)
        self._steps_left -= 1

    def reset(self) -> None:
        """See `Decoder`."""
        self._steps_left = 0


class PackedCpuDecoder:
    """Packed samples on the host: the thread that reads a sample decodes it and looks up its logarithms.

    Passing a sample to another thread costs a tenth as much as decoding it. The output buffers, used in
    turn, are most of the memory of the loader.
    """

    depth = 1

    def __init__(self, spec: SampleSpec, config: LoaderConfig) -> None:
        # A sample for each thread, and `prefetch` batches that are ready.
        self.lookahead = config.prefetch + -(-config.threads // config.batch_size)
        self._apply_log = config.apply_log
        self._table = lookup_table(apply_log=config.apply_log)
        buffers = [torch.empty(config.batch_size, *spec.shape) for _ in range(self.lookahead + 1)]
        # Views are made here: each call of torch releases the GIL, which costs time when threads are busy.
        self._buffers = itertools.cycle(
            [(buffer.numpy(), buffer.permute(0, 4, 1, 2, 3)) for buffer in buffers]
        )
        self._reserved: deque[torch.Tensor] = deque()

    def reserve(self) -> Sequence[OnRead]:
        """See `Decoder`."""
        # The oldest buffer is that of the batch taken last, which is no longer in use.
        buffer, volume = next(self._buffers)
        self._reserved.append(volume)
        return [functools.partial(self._decode, out=out) for out in buffer]

    def submit(self, payloads: Sequence[Payload], upcoming: Indices) -> None:
        """See `Decoder`; the samples are decoded already."""

    def next(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`."""
        volume = self._reserved.popleft()
        return volume if into is None else into.copy_(volume)

    def reset(self) -> None:
        """See `Decoder`."""
        self._reserved.clear()

    def _decode(self, payload: Payload, out: npt.NDArray[np.float32]) -> None:
        """Write the volume of `payload` into `out` (D, H, W, C)."""
        packed: PackedSample = payload  # type: ignore[assignment]
        packed.fill(out, np.take(self._table, packed.table))
        if not self._apply_log:
            out /= out.mean(dtype=np.float64).astype(np.float32)


class PackedGpuDecoder(_DaliDecoder):
    """Packed samples on a GPU: DALI inflates them there, and a kernel gathers the values of each voxel."""

    def __init__(self, spec: SampleSpec, config: LoaderConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._gather = choose_gather(device)
        self._volume = torch.empty(config.batch_size, *spec.shape, device=device).permute(0, 4, 1, 2, 3)
        self._inputs: deque[PackedArrays] = deque()
        # Batches in the pipeline, with the arrays that DALI reads in place.
        self._submitted: deque[tuple[list[PackedSample], PackedArrays]] = deque()
        self._start(lambda: packed_nodes(self._inputs, apply_log=config.apply_log))

    def submit(self, payloads: Sequence[Payload], upcoming: Indices) -> None:
        """See `Decoder`."""
        batch: list[PackedSample] = list(payloads)  # type: ignore[arg-type]
        arrays = arrays_of(batch)
        self._submitted.append((batch, arrays))
        self._inputs.append(arrays)

    def next(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`; `into` may be of any floating dtype."""
        blocks, tables = self._run()
        volume = self._volume if into is None else into
        batch, _ = self._submitted.popleft()
        for row, packed in enumerate(batch):
            self._gather(
                as_torch(blocks[row], self._device),
                as_torch(tables[row], self._device),
                volume[row].permute(1, 2, 3, 0),
                planes=packed.header.planes,
                byte_sum=packed.header.byte_sum,
                by_mean=not self._config.apply_log,
            )
        self._record_read()
        return volume


def make_decoder(split: SampleDataset, config: LoaderConfig, device: torch.device) -> Decoder:
    """Return the decoder for the format of `split` and for `device`.

    Raises:
        ConfigError: `loader.gpu_direct` is set for another format than npy, or without a GPU.
    """
    if config.gpu_direct:
        if split.format_name != Npy.name or device.type != "cuda":
            fault = f"requires npy samples and a GPU, not {split.format_name} on {device.type}: unset it"
            raise ConfigError("loader.gpu_direct", True, fault)
        # A partition without samples has no file to read for its padding rows.
        if len(split):
            return FilesDecoder(split, config, device)
    if not split.sharded:
        return CountsDecoder(config, device)
    if device.type == "cuda":
        return PackedGpuDecoder(split.spec, config, device)
    return PackedCpuDecoder(split.spec, config)
