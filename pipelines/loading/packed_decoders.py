"""Decoders of packed samples.

On a GPU a kernel gathers them, and DALI inflates the LZ4 ones. DALI has no such operator for the CPU, so
there the reader threads do all of it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import mmap
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import DataError
from pipelines.formats.packed.codecs import Codec
from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.gather_choice import choose_gather
from pipelines.formats.packed.gather_gpu import Arrays, DeviceSample, device_sample, gather_sample
from pipelines.formats.packed.nvcomp import NvcompInflater, choose_inflater
from pipelines.formats.payload import Payload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.dali_graphs import packed_nodes
from pipelines.loading.decoder import DaliDecoder, OnRead, as_torch
from pipelines.loading.transforms import lookup_table
from pipelines.plan import Indices
from pipelines.slab import Slab, shape_to_read

logger = logging.getLogger(__name__)


class PackedCpuDecoder:
    """Packed samples on the host: the thread that reads a sample decodes it and looks up its logarithms.

    Passing a sample to another thread costs a tenth as much as decoding it. The output buffers, used in
    turn, are most of the memory of the loader.
    """

    depth = 1

    def __init__(self, shape: Sequence[int], config: LoaderConfig) -> None:
        # A sample for each thread, and `prefetch` batches that are ready.
        self.lookahead = config.prefetch + -(-config.threads // config.batch_size)
        self._apply_log = config.apply_log
        self._table = lookup_table(apply_log=config.apply_log)
        buffers = [_huge_pages(config.batch_size, *shape) for _ in range(self.lookahead + 1)]
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


def _huge_pages(*shape: int) -> torch.Tensor:
    """Return an uninitialised float32 tensor in large memory pages, of which a sample needs fewer."""
    memory = mmap.mmap(-1, 4 * math.prod(shape))
    with contextlib.suppress(OSError):  # The call is only a hint.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


class PackedGpuDecoder(DaliDecoder):
    """Packed samples on a GPU: a kernel gathers the values of each voxel from symbols and escapes.

    Args:
        shape: Shape of what is read of a sample, (D, H, W, C).
        codec: LZ4 to have DALI inflate the symbols on the GPU, ZSTD for `inflater` to do it, STORED for the
            reader threads.
    """

    def __init__(
        self,
        shape: Sequence[int],
        config: LoaderConfig,
        device: torch.device,
        codec: Codec,
        inflater: NvcompInflater | None = None,
    ) -> None:
        super().__init__(config, device)
        self._gather, self._codec, self._inflater = choose_gather(device), codec, inflater
        self._volume = torch.empty(config.batch_size, *shape, device=device).permute(0, 4, 1, 2, 3)
        self._inputs: deque[list[Arrays]] = deque()
        # Batches that are read or in the pipeline, with the arrays that DALI reads in place.
        self._reserved: deque[list[DeviceSample | None]] = deque()
        self._submitted: deque[list[DeviceSample]] = deque()
        self._start(lambda: packed_nodes(self._inputs, codec, device, apply_log=config.apply_log))

    def reserve(self) -> Sequence[OnRead]:
        """See `Decoder`."""
        batch: list[DeviceSample | None] = [None] * self._config.batch_size
        self._reserved.append(batch)
        return [functools.partial(self._prepare, batch, row) for row in range(len(batch))]

    def submit(self, payloads: Sequence[Payload], upcoming: Indices) -> None:
        """See `Decoder`."""
        batch: list[DeviceSample] = self._reserved.popleft()  # type: ignore[assignment]
        self._submitted.append(batch)
        self._inputs.append([sample.arrays for sample in batch])

    def next(self, into: torch.Tensor | None) -> torch.Tensor:
        """See `Decoder`; `into` may be of any floating dtype."""
        outputs = self._run()
        volume = self._volume if into is None else into
        for row, sample in enumerate(self._submitted.popleft()):
            symbols, escapes, table = (as_torch(output[row], self._device) for output in outputs)
            if self._inflater:
                symbols = self._inflater.inflate(symbols, sample.starts, sample.sizes)
                if len(symbols) != sample.voxels:
                    # The loader reads its samples on the host then, and names the damaged one.
                    raise RuntimeError(f"nvCOMP inflated {len(symbols)} bytes of a packed sample")
            inputs, out = (symbols, escapes, table), volume[row].permute(1, 2, 3, 0)
            gather_sample(self._gather, sample, inputs, out, by_mean=not self._config.apply_log)
        self._record_read()
        return volume

    def reset(self) -> None:
        """See `Decoder`."""
        self._reserved.clear()

    def _prepare(self, batch: list[DeviceSample | None], row: int, payload: Payload) -> None:
        packed: PackedSample = payload  # type: ignore[assignment]
        batch[row] = device_sample(packed, self._codec)


def make_packed_gpu_decoder(
    split: SampleDataset, config: LoaderConfig, device: torch.device, slab: Slab | None = None
) -> PackedGpuDecoder:
    """Return the decoder for the codec of the first sample of `split`; it also takes samples of others."""
    codec, inflater, inflates = Codec.STORED, None, "the reader threads inflate (DALI inflates LZ4 alone)"
    first = Codec.STORED
    # A partition without samples has padding rows only.
    if len(split):
        with contextlib.suppress(DataError):
            packed = split.payload(0, slab=slab)
            assert isinstance(packed, PackedSample)
            first = packed.header.codecs[1]
    if first == Codec.LZ4:
        codec, inflates = Codec.LZ4, "DALI inflates on the GPU"
    elif first == Codec.ZSTD and (inflater := choose_inflater(device)):
        codec, inflates = Codec.ZSTD, "nvCOMP inflates on the GPU"
    logger.info("packed samples: %s", inflates)
    return PackedGpuDecoder(shape_to_read(split.spec, slab), config, device, codec, inflater)
