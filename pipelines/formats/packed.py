"""One sample in the packed form: smaller than gzip, and inflated in parallel; see docs/packed.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.files import Written, read_file, write_chunks
from pipelines.packed import Packed, open_packed
from pipelines.packing import encode
from pipelines.sample import Sample, SampleSpec

SUFFIX = ".packed"


class PackedPayload(NamedTuple):
    """What a reader thread hands on of one packed sample: as it is, and the target."""

    packed: Packed
    target: npt.NDArray[np.float32]


class PackedFormat:
    """One sample in a file `<stem>.packed`, or the same bytes as a member of a shard; see the module."""

    name = "packed"
    suffix = SUFFIX
    parts = (SUFFIX,)
    extras = ()

    def write(self, directory: Path, stem: str, sample: Sample) -> tuple[Written, ...]:
        """Write the file, whole or not at all."""
        return (write_chunks(directory / f"{stem}{SUFFIX}", *encode(sample)),)

    def parse(self, path: Path, contents: Mapping[str, bytes], spec: SampleSpec | None = None) -> Sample:
        """The sample; all checksums are compared."""
        packed = open_packed(path, contents[SUFFIX], spec)
        packed.check()
        counts = np.empty(packed.spec.shape, np.int16)
        packed.fill(counts, packed.table)
        return Sample(counts, packed.target)

    def read(self, path: Path, spec: SampleSpec | None = None) -> Sample:
        """The sample in the file at `path`."""
        return self.parse(path, {SUFFIX: read_file(path)}, spec)

    def payload(self, path: Path, spec: SampleSpec, *, whole: bool = False) -> PackedPayload:
        """The sample in the file at `path`, its checksums compared, its chunks not inflated."""
        return payload_of(path, read_file(path), spec, whole=whole)


def payload_of(path: Path, content: bytes, spec: SampleSpec, *, whole: bool) -> PackedPayload:
    """That of the sample in `content`; see `Format.payload`."""
    packed = open_packed(path, content, spec)
    packed.check()
    if whole:
        packed.fill(np.empty(spec.shape, np.int16), packed.table)
    return PackedPayload(packed, packed.target)
