"""The contract of a sample format, and the form in which samples enter the decoding pipeline."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.formats.packed.decode import PackedSample
from pipelines.io import WrittenFile
from pipelines.sample import Sample, SampleSpec


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


class Format(Protocol):
    """A file format of samples: one sample in files `<directory>/<sample_id><suffix>`, or a shard of them."""

    @property
    def name(self) -> str:
        """Name on the command line and in manifests."""

    @property
    def suffix(self) -> str:
        """Suffix of the file that holds the counts."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of all files that reading a sample needs."""

    @property
    def extra_suffixes(self) -> tuple[str, ...]:
        """Suffixes of further files that `write` makes."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the contents that `parse` takes, the counts last: `suffixes`, or that of a member."""

    def write(self, directory: Path, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write `sample`, each file atomically, the one with the counts last."""

    def parse(self, path: Path, contents: Mapping[str, bytes], spec: SampleSpec | None = None) -> Sample:
        """Parse and fully validate one sample.

        Args:
            path: file that holds the counts, named in errors.
            contents: bytes of the sample by `keys`; the result may be a view of them.
            spec: expected shape; None accepts any.

        Raises:
            DataError: the content is damaged or not of this format.
        """
