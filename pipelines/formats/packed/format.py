"""Samples in the packed form, in shards: smaller than gzip, and inflated in parallel; see docs/packed.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.formats.packed.decode import PackedSample, open_packed
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import (
    INDEX_SUFFIX,
    SHARD_SUFFIX,
    read_member,
    read_members,
    write_shard,
)
from pipelines.io import TarMember, WrittenFile
from pipelines.sample import Sample, SampleSpec

MEMBER_SUFFIX = ".packed"
"""The end of a member's name; what is before it is the sample's id."""


class PackedPayload(NamedTuple):
    """What a reader thread hands on of one packed sample: as it is, and the target."""

    packed: PackedSample
    target: npt.NDArray[np.float32]


class PackedFormat:
    """Samples as members `<sample_id>.packed` of shards; `write` makes a shard of one, `<sample_id>.tar`."""

    name = "packed"
    suffix = SHARD_SUFFIX
    suffixes = (SHARD_SUFFIX,)
    extra_suffixes = (INDEX_SUFFIX,)

    def write(self, directory: Path, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write a shard of `sample` alone, and its index."""
        return write_shard(
            directory / f"{sample_id}{SHARD_SUFFIX}", [(sample_id + MEMBER_SUFFIX, encode(sample))]
        )

    def parse(self, path: Path, files: Mapping[str, bytes], spec: SampleSpec | None = None) -> Sample:
        """The sample in the member `files[".packed"]`; all checksums are compared."""
        packed = open_packed(path, files[MEMBER_SUFFIX], spec)
        return Sample(packed.counts(), packed.target)

    def read(self, path: Path, spec: SampleSpec | None = None) -> Sample:
        """The one sample in the shard at `path`."""
        only = _only(path)
        return self.parse(path, {MEMBER_SUFFIX: read_member(path, *only)}, spec)

    def payload(self, path: Path, spec: SampleSpec, *, fully_validate: bool = False) -> PackedPayload:
        """The same, its checksums compared, its chunks not inflated but with `fully_validate`."""
        return packed_payload(path, read_member(path, *_only(path)), spec, fully_validate=fully_validate)


def packed_payload(path: Path, content: bytes, spec: SampleSpec, *, fully_validate: bool) -> PackedPayload:
    """That of the sample in `content`, a member's bytes; see `Format.payload`."""
    packed = open_packed(path, content, spec)
    if fully_validate:
        packed.counts()
    else:
        packed.check()
    return PackedPayload(packed, packed.target)


def encode_payload(sample: Sample, spec: SampleSpec) -> PackedPayload:
    """Return the payload of a sample in memory, for padding."""
    return packed_payload(Path("padding"), b"".join(encode(sample)), spec, fully_validate=False)


def member_sample_id(name: str) -> str:
    """The id of the sample in the member `name`, which may lead through folders."""
    return name.rpartition("/")[2].removesuffix(MEMBER_SUFFIX)


def sample_members(path: Path) -> tuple[TarMember, ...]:
    """The samples in the shard at `path`, by its headers; DataError where it is no shard, or has none."""
    found = tuple(member for member in read_members(path) if member.name.endswith(MEMBER_SUFFIX))
    if not found:
        raise DataError(path, "holds no samples", f"expected a tar of *{MEMBER_SUFFIX} files")
    return found


def _only(path: Path) -> TarMember:
    first, *others = sample_members(path)
    if others:
        raise DataError(path, f"holds {len(others) + 1} samples", "expected one")
    return first
