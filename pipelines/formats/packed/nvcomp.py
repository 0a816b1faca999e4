"""Inflation of Zstandard blocks on a GPU by nvCOMP's own Python package, where that is installed.

DALI inflates LZ4 alone. See https://docs.nvidia.com/cuda/nvcomp/py_api.html; no GPU has run this yet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import zstandard

logger = logging.getLogger(__name__)


class NvcompInflater:
    """Zstandard on `device`; ImportError without the package."""

    def __init__(self, device: torch.device) -> None:
        from nvidia import nvcomp

        self._nvcomp: Any = nvcomp
        self._device = device
        self._codecs: dict[int, Any] = {}

    def inflate(self, blocks: torch.Tensor, starts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return the contents of the frames of `blocks` at `starts`, concatenated, (bytes,) uint8.

        Args:
            blocks: (bytes,) uint8 on the device.
            sizes: bytes of each frame.
        """
        extents = zip(starts, sizes, strict=True)
        frames = [self._nvcomp.as_array(blocks[start : start + size]) for start, size in extents]
        contents = self._codec().decode(frames, data_type="|u1")
        return torch.cat([torch.as_tensor(content, device=self._device) for content in contents])

    def _codec(self) -> Any:
        """Return the codec of the current stream, which orders its work with torch's."""
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        if stream not in self._codecs:
            self._codecs[stream] = self._nvcomp.Codec(
                algorithm="Zstd",
                bitstream_kind=self._nvcomp.BitstreamKind.RAW,
                device_id=self._device.index,
                cuda_stream=stream,
            )
        return self._codecs[stream]


def choose_inflater(device: torch.device) -> NvcompInflater | None:
    """Return nvCOMP if it is installed and inflates known frames on `device`; log the reason if not."""
    contents = [bytes(range(256)) * count for count in (1, 7, 64)]
    frames = [zstandard.compress(content) for content in contents]
    sizes = list(map(len, frames))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    try:
        inflater = NvcompInflater(device)
        blocks = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8).to(device)
        if bytes(inflater.inflate(blocks, starts, sizes).tolist()) == b"".join(contents):
            return inflater
        reason = "it inflates other bytes than were compressed"
    except Exception as error:  # an import, or the library, which raises many types
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    logger.info("nvCOMP does not inflate packed samples on the GPU (%s)", reason)
    return None
