"""What a format promises: both halves of it, writer and reader, behind one contract."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.formats.packed.format import PackedPayload
from pipelines.io import WrittenFile
from pipelines.sample import Sample, SampleSpec


class CountsPayload(NamedTuple):
    """What a reader thread hands to the pipeline of one sample, and the target, which stays on the host.

    counts: (D, H, W, C) int16.
    target: (4,) float32.
    mapped: the file that the counts are a view of, of which no page has been asked for; or None.
    """

    counts: npt.NDArray[np.int16]
    target: npt.NDArray[np.float32]
    mapped: mmap.mmap | None = None


Payload: TypeAlias = CountsPayload | PackedPayload


class Format(Protocol):
    """A way to keep one sample in files `<directory>/<sample_id><suffix>`."""

    @property
    def name(self) -> str:
        """The name on the command line."""

    @property
    def suffix(self) -> str:
        """The end of the name of the file that holds the counts."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The ends of the names of all files that reading a sample needs."""

    @property
    def extra_suffixes(self) -> tuple[str, ...]:
        """The ends of the names of other files that `write` makes."""

    def write(self, directory: Path, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write `sample`, each file whole or not at all, that with the counts last."""

    def parse(self, path: Path, files: Mapping[str, bytes], spec: SampleSpec | None = None) -> Sample:
        """The sample in `files`, by the ends of their names, checked in full.

        path: that of the file that holds the counts. DataError names any fault, and the file.
        """

    def read(self, path: Path, spec: SampleSpec | None = None) -> Sample:
        """The sample whose counts are in `path`: what is there, parsed."""

    def payload(self, path: Path, spec: SampleSpec, *, fully_validate: bool = False) -> Payload:
        """The same in a reader thread, for the pipeline; DataError for what that would not notice.

        With `fully_validate`, for every fault, so that it is known before the sample is used.
        """
