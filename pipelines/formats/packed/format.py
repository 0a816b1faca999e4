"""Packed samples in tar shards: smaller than gzip, and decoded in parallel; see docs/packed.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import DataError
from pipelines.formats.base import Format
from pipelines.formats.packed.decode import PackedSample, open_packed
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import INDEX_SUFFIX, SHARD_SUFFIX, read_members, write_shard
from pipelines.io import TarMember, WrittenFile
from pipelines.sample import Sample, SampleSpec

MEMBER_SUFFIX = ".packed"
"""Suffix of a member's name; the rest of it is the sample id."""


class PackedFormat(Format):
    """Samples as members `<sample_id>.packed` of shards; `write` makes a shard of one, `<sample_id>.tar`."""

    name = "packed"
    suffix = SHARD_SUFFIX
    suffixes = (SHARD_SUFFIX,)
    extra_suffixes = (INDEX_SUFFIX,)
    keys = (MEMBER_SUFFIX,)

    def write(self, directory: Path, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write the index of a shard of `sample` alone, and the shard."""
        members = [(sample_id + MEMBER_SUFFIX, encode(sample))]
        return write_shard(directory / f"{sample_id}{SHARD_SUFFIX}", members)

    def parse(
        self,
        path: Path,
        contents: Mapping[str, bytes],
        spec: SampleSpec | None = None,
        *,
        labeled: bool = True,
    ) -> Sample:
        """See `Format.parse`; all checksums are compared."""
        packed = open_packed(path, contents[MEMBER_SUFFIX], spec, labeled=labeled)
        return Sample(packed.decode(), packed.target)


def encode_payload(sample: Sample) -> PackedSample:
    """Return the payload of a sample in memory, for padding."""
    return open_packed(Path("padding"), b"".join(encode(sample)))


def sample_members(path: Path) -> tuple[TarMember, ...]:
    """Return the packed samples in the shard at `path`, found by reading its headers.

    Raises:
        DataError: the file is not a complete tar archive, or holds no packed samples.
    """
    found = tuple(member for member in read_members(path) if member.name.endswith(MEMBER_SUFFIX))
    if not found:
        raise DataError(path, "holds no samples", f"expected a tar of *{MEMBER_SUFFIX} files")
    return found
