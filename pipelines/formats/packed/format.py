"""Samples in the packed form, in shards: smaller than gzip, and inflated in parallel; see docs/packed.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.formats.packed.decode import Packed, open_packed
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import INDEX, SHARD, read_member, read_members, write_shard
from pipelines.io import TarMember, Written
from pipelines.sample import Sample, SampleSpec

MEMBER = ".packed"
"""The end of a member's name; what is before it is the sample's stem."""


class PackedPayload(NamedTuple):
    """What a reader thread hands on of one packed sample: as it is, and the target."""

    packed: Packed
    target: npt.NDArray[np.float32]


class PackedFormat:
    """Samples as members `<stem>.packed` of shards; `write` makes a shard of one, `<stem>.tar`."""

    name = "packed"
    suffix = SHARD
    parts = (SHARD,)
    extras = (INDEX,)

    def write(self, directory: Path, stem: str, sample: Sample) -> tuple[Written, ...]:
        """Write a shard of `sample` alone, and its index."""
        return write_shard(directory / f"{stem}{SHARD}", [(stem + MEMBER, encode(sample))])

    def parse(self, path: Path, contents: Mapping[str, bytes], spec: SampleSpec | None = None) -> Sample:
        """The sample in the member `contents[".packed"]`; all checksums are compared."""
        packed = open_packed(path, contents[MEMBER], spec)
        return Sample(packed.counts(), packed.target)

    def read(self, path: Path, spec: SampleSpec | None = None) -> Sample:
        """The one sample in the shard at `path`."""
        only = _only(path)
        return self.parse(path, {MEMBER: read_member(path, *only)}, spec)

    def payload(self, path: Path, spec: SampleSpec, *, whole: bool = False) -> PackedPayload:
        """The same, its checksums compared, its chunks not inflated but with `whole`."""
        return payload_of(path, read_member(path, *_only(path)), spec, whole=whole)


def payload_of(path: Path, content: bytes, spec: SampleSpec, *, whole: bool) -> PackedPayload:
    """That of the sample in `content`, a member's bytes; see `Format.payload`."""
    packed = open_packed(path, content, spec)
    if whole:
        packed.counts()
    else:
        packed.check()
    return PackedPayload(packed, packed.target)


def member_stem(name: str) -> str:
    """The stem of the sample in the member `name`, which may lead through folders."""
    return name.rpartition("/")[2].removesuffix(MEMBER)


def sample_members(path: Path) -> tuple[TarMember, ...]:
    """The samples in the shard at `path`, by its headers; DataError where it is no shard, or has none."""
    found = tuple(member for member in read_members(path) if member.name.endswith(MEMBER))
    if not found:
        raise DataError(path, "holds no samples", f"expected a tar of *{MEMBER} files")
    return found


def _only(path: Path) -> TarMember:
    first, *others = sample_members(path)
    if others:
        raise DataError(path, f"holds {len(others) + 1} samples", "expected one")
    return first
