"""The forms in which samples enter the decoding pipeline."""

from __future__ import annotations

import mmap
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.formats.packed.decode import PackedSample


class CountsPayload(NamedTuple):
    """An unpacked sample for the decoder.

    Attributes:
        counts: (D, H, W, C) int16.
        target: (4,) float32, kept on the host.
        mapped: the memory map that `counts` is a view of, not read yet; None for counts in memory.
    """

    counts: npt.NDArray[np.int16]
    target: npt.NDArray[np.float32]
    mapped: mmap.mmap | None = None


Payload: TypeAlias = CountsPayload | PackedSample
