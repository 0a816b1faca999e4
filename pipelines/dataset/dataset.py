"""The samples of a folder, in order: where each one is, how it is read, and what vouches for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.dataset.manifest import MANIFEST
from pipelines.errors import DataError
from pipelines.formats.base import CountsPayload, Format, Payload
from pipelines.formats.packed.format import MEMBER_SUFFIX, PackedFormat, member_sample_id, packed_payload
from pipelines.formats.packed.tar_shard import clear_handle_cache, read_member
from pipelines.formats.registry import FORMATS
from pipelines.io import TarMember, read_file
from pipelines.plan import Indices
from pipelines.sample import Sample, SampleSpec

_CHANGED = (
    f"fetch or convert it again, or if it was changed on purpose, remove {MANIFEST} and write it anew with "
    "python -m preprocess.verify --write"
)


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """One of `count` shares of a split of `total` samples, as equal as can be.

    global_indices: the positions in the whole of this one's samples, int64.
    seed: what drew the shares; None where each has every `count`-th sample.
    """

    global_indices: Indices
    count: int
    total: int
    seed: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Where samples lie in their shards: the first byte of each, and how many they are, int64."""

    offsets: Indices
    lengths: Indices


@dataclass(frozen=True, slots=True, eq=False)
class SampleDataset:
    """The samples of one folder, in the order of its manifest, its list file or their names.

    root: the folder.
    format_name: the name of their format, a key of FORMATS.
    names: the files that hold the counts, one a sample; `<shard>/<member>` of those in shards.
    spec: the shape of every sample.
    extents: where in their shards they lie; None for samples in files of their own.
    partition: where its samples stand in a whole of which this is a share; None for the whole itself.
    checksums: what the folder's manifest says of the files that `files` gives, (samples, files, 2) int64: the
        length in bytes and the CRC-32C of each, both -1 where it does not say. None for samples in shards,
        which have CRCs of their own, and without a manifest.
    """

    root: Path
    format_name: str
    names: tuple[str, ...]
    spec: SampleSpec
    extents: Extents | None = None
    partition: Partition | None = None
    checksums: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def format(self) -> Format:
        """The format itself."""
        return FORMATS[self.format_name]

    @property
    def total(self) -> int:
        """How many samples the whole has."""
        return self.partition.total if self.partition else len(self)

    @property
    def num_partitions(self) -> int:
        """Into how many shares the whole has been divided."""
        return self.partition.count if self.partition else 1

    @property
    def partition_signature(self) -> str:
        """How the whole has been divided, in words that are equal for equal shares."""
        drawn = (
            f" drawn with seed {self.partition.seed}"
            if self.partition and self.partition.seed is not None
            else ""
        )
        return f"{self.num_partitions} shares{drawn}" if self.num_partitions > 1 else "one share"

    def global_indices(self, index: Indices) -> Indices:
        """Where the samples `index` stand in the whole."""
        return self.partition.global_indices[index] if self.partition else index

    def path(self, index: int) -> Path:
        """The file that holds the counts of sample `index`, or its name in its shard."""
        return self.root / self.names[index]

    def sample_id(self, index: int) -> str:
        """The name of sample `index`, whatever the format."""
        name = self.names[index]
        return member_sample_id(name) if self.extents else name.removesuffix(self.format.suffix)

    @property
    def entry_names(self) -> list[str]:
        """The stems of its samples' files, or of its shards, in order."""
        if not self.extents:
            return [self.sample_id(index) for index in range(len(self))]
        shards = dict.fromkeys(name.partition("/")[0] for name in self.names)
        return [shard.removesuffix(self.format.suffix) for shard in shards]

    def files(self, index: int) -> tuple[Path, ...]:
        """The files that reading sample `index` needs."""
        if self.extents:
            return (self._place(index)[0],)
        stem = self.sample_id(index)
        return tuple(self.root / (stem + part) for part in self.format.suffixes)

    @property
    def file_keys(self) -> tuple[str, ...]:
        """What `contents` has of each sample."""
        return (MEMBER_SUFFIX,) if self.extents else self.format.suffixes

    def read_files(self, index: int, *, direct: bool = False) -> dict[str, bytes]:
        """The bytes of sample `index` as `Format.parse` takes them; `direct` reads past the page cache."""
        if not self.extents:
            files = zip(self.file_keys, self.files(index), strict=True)
            return {kind: read_file(path, direct=direct) for kind, path in files}
        extent = int(self.extents.offsets[index]), int(self.extents.lengths[index])
        return {MEMBER_SUFFIX: read_member(*self._place(index), *extent, direct=direct)}

    def _place(self, index: int) -> tuple[Path, str]:
        """The shard that holds sample `index`, and its name there, which may lead through folders."""
        shard, _, member = self.names[index].partition("/")
        return self.root / shard, member

    def read_verified(self, index: int, *, direct: bool = False) -> dict[str, bytes]:
        """`contents`, compared with what the manifest says, if there is one; DataError names any fault.

        For whoever makes other files of them: a format without checksums would have damage pass for sound.
        """
        contents = self.read_files(index, direct=direct)
        if self.checksums is not None:
            told = self.checksums[index].tolist()
            for path, content, (length, crc) in zip(self.files(index), contents.values(), told, strict=True):
                if length >= 0 and len(content) != length:
                    fault = f"has {len(content)} bytes where {MANIFEST} says {length}"
                    raise DataError(path, fault, _CHANGED)
                if length >= 0 and crc32c.crc32c(content) != crc:
                    raise DataError(path, f"its CRC-32C is not that in {MANIFEST}", _CHANGED)
        return contents

    def read(self, index: int) -> Sample:
        """Sample `index`, read and checked on the host; DataError names any fault."""
        return self.format.parse(self.path(index), self.read_files(index), self.spec)

    def payload(self, index: int, *, fully_validate: bool = False, direct: bool = False) -> Payload:
        """Sample `index` for the pipeline; see `Format.payload`, and `contents` for `direct`."""
        path = self.path(index)
        if self.extents:
            content = self.read_files(index, direct=direct)[MEMBER_SUFFIX]
            return packed_payload(path, content, self.spec, fully_validate=fully_validate)
        if direct:
            sample = self.format.parse(path, self.read_files(index, direct=True), self.spec)
            return CountsPayload(sample.counts, sample.target)
        return self.format.payload(path, self.spec, fully_validate=fully_validate)

    def subset(self, index: Indices, partition: Partition | None = None) -> SampleDataset:
        """The samples `index` alone; `partition` says if they are one."""
        names = tuple(self.names[i] for i in index.tolist())
        extents = self.extents and Extents(self.extents.offsets[index], self.extents.lengths[index])
        sums = None if self.checksums is None else self.checksums[index]
        return replace(self, names=names, extents=extents, partition=partition, checksums=sums)


def dataset_from_shards(
    folder: Path, shards: Iterable[tuple[str, Sequence[TarMember]]], spec: SampleSpec
) -> SampleDataset:
    """The samples of `spec` in the `shards` of `folder`, each with its members.

    DataError where two have the same name.
    """
    clear_handle_cache()
    found = [(f"{name}/{member.name}", member) for name, members in shards for member in members]
    first: dict[str, str] = {}
    for name, member in found:
        stem = member.name.rpartition("/")[2]
        if stem in first:
            raise DataError(folder / name, f"has the same name as {first[stem]}", "keep one of them")
        first[stem] = name
    places = np.array([member[1:] for _, member in found], np.int64).reshape(-1, 2)
    extents = Extents(places[:, 0], places[:, 1])
    return SampleDataset(folder, PackedFormat.name, tuple(name for name, _ in found), spec, extents)
