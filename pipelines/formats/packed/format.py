"""Packed samples in tar shards: smaller than gzip, and decoded in parallel; see docs/packed.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipelines.errors import DataError
from pipelines.formats.base import Format
from pipelines.formats.packed.decode import PackedSample, open_packed, open_slab
from pipelines.formats.packed.encode import DEFAULT_PRESET, PRESETS, encode, encode_rows
from pipelines.formats.packed.tar_shard import INDEX_SUFFIX, SHARD_SUFFIX, read_members, write_shard
from pipelines.io import TarMember, WrittenFile
from pipelines.sample import PARAMETERS, Sample, SampleSpec
from pipelines.slab import Slab
from pipelines.storage.location import Location

MEMBER_SUFFIX = ".packed"
"""Suffix of a member's name; the rest of it is the sample id."""


class PackedFormat(Format):
    """Samples as members `<sample_id>.packed` of shards; `write` makes a shard of one, `<sample_id>.tar`."""

    name = "packed"
    suffix = SHARD_SUFFIX
    suffixes = (SHARD_SUFFIX,)
    extra_suffixes = (INDEX_SUFFIX,)
    keys = (MEMBER_SUFFIX,)

    def write(self, directory: Location, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write the index of a shard of `sample` alone, and the shard."""
        members = [(sample_id + MEMBER_SUFFIX, encode(sample))]
        return write_shard(directory / f"{sample_id}{SHARD_SUFFIX}", members)

    def parse(
        self,
        path: Location,
        contents: Mapping[str, bytes],
        spec: SampleSpec | None = None,
        *,
        labeled: bool = True,
    ) -> Sample:
        """See `Format.parse`; all checksums are compared."""
        packed = open_packed(path, contents[MEMBER_SUFFIX], spec, labeled=labeled)
        return Sample(packed.decode(), packed.target)


def padding_payload(spec: SampleSpec, slab: Slab | None) -> PackedSample:
    """Return a sample of `spec`, or `slab` of it, with one particle in every voxel."""
    table, target = np.ones((1, spec.channels), np.int16), np.zeros(len(PARAMETERS), np.float32)
    rows = np.zeros(spec.size**3, np.uint8)
    content = b"".join(encode_rows(table, rows, spec.size, target, PRESETS[DEFAULT_PRESET]))
    path = Path("padding")
    if slab is None:
        return open_packed(path, content)
    return open_slab(path, lambda at, length: content[at : at + length], len(content), spec, slab)


def sample_members(path: Location) -> tuple[TarMember, ...]:
    """Return the packed samples in the shard at `path`, found by reading its headers.

    Raises:
        DataError: the file is not a complete tar archive, or holds no packed samples.
    """
    found = tuple(member for member in read_members(path) if member.name.endswith(MEMBER_SUFFIX))
    if not found:
        raise DataError(path, "holds no samples", f"expected a tar of *{MEMBER_SUFFIX} files")
    return found
