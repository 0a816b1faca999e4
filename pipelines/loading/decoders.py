"""Decoders: batches of payloads, as the reader threads have read them, become batches of volumes.

The loader submits payloads and takes volumes, in the same order. Counts pass through a DALI graph on
every device; packed samples have decoders of their own.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import ConfigError
from pipelines.formats.npy import Npy
from pipelines.formats.payload import CountsPayload, Payload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.dali_graphs import counts_node, files_node
from pipelines.loading.decoder import READ_AHEAD, DaliDecoder, Decoder
from pipelines.loading.packed_decoders import PackedCpuDecoder, make_packed_gpu_decoder
from pipelines.plan import Indices
from pipelines.slab import Slab, shape_to_read


class CountsDecoder(DaliDecoder):
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


class FilesDecoder(DaliDecoder):
    """Counts of .npy files that DALI reads itself, on a GPU directly into its memory.

    The payloads serve to validate headers and targets; their counts are not accessed. DALI's reader
    takes a fixed list of files, so that each epoch has a pipeline of its own.
    """

    def __init__(self, split: SampleDataset, config: LoaderConfig, device: torch.device) -> None:
        super().__init__(config, device)
        # The reader in the pipeline works ahead: it must find nothing that was not validated.
        self.depth, self.lookahead = 1, READ_AHEAD + config.prefetch
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


def make_decoder(
    split: SampleDataset, config: LoaderConfig, device: torch.device, slab: Slab | None = None
) -> Decoder:
    """Return the decoder for the format of `split`, or of `slab` of its samples, and for `device`.

    Raises:
        ConfigError: `loader.gpu_direct` is set for another format than npy, or without a GPU; or these
            settings cannot be used with slabs.
    """
    if slab is not None:
        split.check_slab(slab)
        config.check_slabs()
    if config.gpu_direct:
        if split.format_name != Npy.name or split.storage.is_remote or device.type != "cuda":
            found = f"{split.format_name} in {split.root} on {device.type}"
            fault = f"requires npy files and a GPU, not {found}: unset it"
            raise ConfigError("loader.gpu_direct", True, fault)
        # A partition without samples has no file to read for its padding rows.
        if len(split):
            return FilesDecoder(split, config, device)
    if not split.sharded:
        return CountsDecoder(config, device)
    if device.type == "cuda":
        return make_packed_gpu_decoder(split, config, device, slab)
    return PackedCpuDecoder(shape_to_read(split.spec, slab), config)
