"""The contract of decoders with the loader, and the base of those whose work DALI does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from pipelines.formats.payload import Payload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.dali_graphs import define_pipeline
from pipelines.plan import Indices

READ_AHEAD = 2
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


class DaliDecoder:
    """Base of the decoders whose work is done by a DALI pipeline, ahead of `next` and in its own threads."""

    lookahead = READ_AHEAD

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
