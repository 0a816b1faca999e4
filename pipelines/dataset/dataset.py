"""The samples of a folder in order: where each is stored, and how it is read and validated."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.dataset.file_lists import DATA_LIST, LABEL_LIST
from pipelines.dataset.manifest import MANIFEST
from pipelines.errors import ConfigError, DataError
from pipelines.formats.base import Format
from pipelines.formats.npy import Npy, cut_slab, map_sample, read_slab
from pipelines.formats.packed.decode import open_packed, open_slab
from pipelines.formats.packed.format import MEMBER_SUFFIX, PackedFormat
from pipelines.formats.packed.tar_shard import read_member
from pipelines.formats.payload import CountsPayload, Payload
from pipelines.formats.registry import FORMATS, READ_IN_PART
from pipelines.plan import Indices, Partition
from pipelines.sample import Sample, SampleSpec
from pipelines.slab import Slab
from pipelines.storage.base import Storage
from pipelines.storage.local import LOCAL
from pipelines.storage.location import Location

EXTENT = np.dtype([("offset", "<i8"), ("bytes", "<i8"), ("crc32c", "<i8")])
"""Position and checksum of one content in its file; -1 where they are not known."""

_PROBES = 8
"""Samples that `fingerprint` reads."""

_Read = TypeVar("_Read")

_REMEDY = (
    f"fetch or convert it again, or if it was changed on purpose, remove {MANIFEST} and regenerate it with "
    "python -m preprocess.verify --write"
)


@dataclass(frozen=True, slots=True, eq=False)
class SampleDataset:
    """The samples of one folder, in the order of its manifest, its list file or their names.

    They are stored in files of their own, or as members of tar shards (packed samples).

    Attributes:
        root: the folder.
        format_name: a key of FORMATS.
        names: of each sample the file that holds the counts, or `<shard>/<member>`.
        spec: the shape of every sample.
        extents: (samples, contents) EXTENT. Of shard members the positions in the shard; of files the
            manifest's lengths and checksums, None without a manifest.
        partition: set if these samples are one part of a larger data set.
        whole: the same samples elsewhere, from which they are read unless a slab is asked for; set if the
            files here have holes outside one slab.
        labeled: False if the counts alone are read; see `Format.parse`.
        storage: holds the files.
        version: changes with the content of any file; empty without a manifest.
    """

    root: Location
    format_name: str
    names: tuple[str, ...]
    spec: SampleSpec
    extents: npt.NDArray[Any] | None = None
    partition: Partition | None = None
    whole: SampleDataset | None = None
    labeled: bool = True
    storage: Storage = LOCAL
    version: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def format(self) -> Format:
        """The format itself."""
        return FORMATS[self.format_name]

    @property
    def sharded(self) -> bool:
        """True if the samples are members of shards."""
        return self.format_name == PackedFormat.name

    @property
    def member_extents(self) -> npt.NDArray[Any]:
        """(samples,) EXTENT of samples that are members of shards."""
        assert self.sharded and self.extents is not None
        return self.extents[:, 0]

    @property
    def total(self) -> int:
        """Number of samples of all partitions together."""
        return self.partition.total if self.partition else len(self)

    @property
    def num_partitions(self) -> int:
        """Number of partitions of the data set."""
        return self.partition.count if self.partition else 1

    @property
    def partition_signature(self) -> str:
        """Description of the partitioning, equal for equal partitionings."""
        seed = self.partition.seed if self.partition else None
        drawn = f" drawn with seed {seed}" if seed is not None else ""
        return f"{self.num_partitions} shares{drawn}" if self.num_partitions > 1 else "one share"

    def global_indices(self, index: Indices) -> Indices:
        """Return the positions of the samples `index` in the data set of all partitions."""
        return self.partition.global_indices[index] if self.partition else index

    def path(self, index: int) -> Location:
        """Return the file that holds the counts of sample `index`, or `<shard>/<member>`."""
        return self.root / self.names[index]

    def sample_id(self, index: int) -> str:
        """Return the name of sample `index`, which is the same in every format."""
        return self.names[index].rpartition("/")[2].removesuffix(self.format.keys[-1])

    @property
    def entry_names(self) -> list[str]:
        """Names of the manifest's entries, in order: the sample ids, or the shards."""
        files = dict.fromkeys(name.partition("/")[0] for name in self.names)
        return [file.removesuffix(self.format.suffix) for file in files]

    def files(self, index: int) -> tuple[Location, ...]:
        """Return the files that reading sample `index` needs, the one with the counts last."""
        entry = self.names[index].partition("/")[0].removesuffix(self.format.suffix)
        suffixes = self.format.suffixes if self.labeled else (self.format.suffix,)
        return tuple(self.root / (entry + suffix) for suffix in suffixes)

    def all_files(self) -> Iterator[Location]:
        """Yield all files of these samples and the records of their folder, whether they exist or not."""
        yield from (self.root / name for name in (MANIFEST, DATA_LIST, LABEL_LIST))
        for name in self.entry_names:
            yield from (self.root / (name + suffix) for suffix in self.format.written_suffixes)

    def read_contents(self, index: int, *, verify: bool = False, direct: bool = False) -> dict[str, bytes]:
        """Read the contents of sample `index`, as `Format.parse` takes them.

        Args:
            verify: compare them with the manifest's lengths and checksums, if there is one, as is always done
                with transferred ones. For conversions: damage in npy files would become valid.
            direct: bypass the page cache, where the file system supports it.

        Raises:
            DataError: a file cannot be read, or differs from the manifest.
        """

        def read(dataset: SampleDataset) -> dict[str, bytes]:
            contents = dataset._contents(index, verify=verify, direct=direct)
            if self.sharded and self.storage.is_remote:
                packed = open_packed(self.path(index), contents[MEMBER_SUFFIX], labeled=self.labeled)
                packed.verify_checksum()
            return contents

        return self._retry_damaged(read)

    def _contents(self, index: int, *, verify: bool = False, direct: bool = False) -> dict[str, bytes]:
        """Read the contents of sample `index` once; see `read_contents`."""
        paths = self.files(index)
        if self.sharded:
            return {MEMBER_SUFFIX: self._read_member(index, direct=direct)}
        contents = [self.storage.read(path, direct=direct) for path in paths]
        if (verify or self.storage.is_remote) and self.extents is not None:
            extents = self.extents[index][-len(paths) :]
            for path, content, extent in zip(paths, contents, extents, strict=True):
                _, length, crc = extent.item()
                if length >= 0 and len(content) != length:
                    raise DataError(path, f"has {len(content)} bytes; {MANIFEST} says {length}", _REMEDY)
                if length >= 0 and crc32c.crc32c(content) != crc:
                    raise DataError(path, f"its CRC-32C is not that in {MANIFEST}", _REMEDY)
        return dict(zip(self.format.keys[-len(paths) :], contents, strict=True))

    def read(self, index: int, *, verify: bool = False) -> Sample:
        """Read and fully validate sample `index` on the host; see `read_contents` for `verify`.

        Raises:
            DataError: the sample cannot be read, or is damaged.
        """
        if self.whole is not None:
            return self.whole.read(index, verify=verify)

        def parse(dataset: SampleDataset) -> Sample:
            contents = dataset._contents(index, verify=verify)
            return self.format.parse(self.path(index), contents, self.spec, labeled=self.labeled)

        return self._retry_damaged(parse)

    def fingerprint(self) -> list[str]:
        """Return digests that tell these samples, in this order, from others, in any folder and format.

        The names alone would not notice files that have exchanged theirs, and reading all contents would
        take hours.

        Returns:
            A digest of the ids of all samples in order, then of the contents of up to 8 of them, evenly
            spaced; empty for one that is damaged or cannot be read.
        """
        ids = json.dumps([self.sample_id(index) for index in range(len(self))])
        digests = [hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()]
        for index in np.linspace(0, len(self) - 1, min(len(self), _PROBES), dtype=int).tolist():
            try:
                sample = self.read(index)
            except DataError:
                digests.append("")
            else:
                content = np.ascontiguousarray(sample.counts).tobytes() + sample.target.tobytes()
                digests.append(hashlib.blake2b(content, digest_size=8).hexdigest())
        return digests

    def check_slab(self, slab: Slab) -> None:
        """Raise ConfigError if `slab` cannot be read of these samples."""
        key, value = "parallel.spatial", slab.count
        if self.spec.size % slab.count:
            raise ConfigError(key, value, f"does not divide the {self.spec.size} planes of a sample")
        if self.format_name not in READ_IN_PART:
            advice = "run python -m preprocess.convert -i SRC -o DST --to packed"
            fault = f"{self.root} holds {self.format_name} samples, of which no part can be read alone"
            raise ConfigError(key, value, f"{fault}: {advice}")

    def payload(
        self, index: int, *, slab: Slab | None = None, fully_validate: bool = False, direct: bool = False
    ) -> Payload:
        """Read sample `index` for the decoder.

        Args:
            slab: read these planes alone, for which `check_slab` has returned.
            fully_validate: find every fault here. Otherwise what is left to the decoder is whether
                packed chunks inflate to what was packed, and whether mapped counts are negative.
            direct: bypass the page cache, where the file system supports it.

        Raises:
            DataError: the sample cannot be read, or is damaged.
        """
        if slab is None and self.whole is not None:
            return self.whole.payload(index, fully_validate=fully_validate, direct=direct)
        return self._retry_damaged(
            lambda dataset: dataset._payload(index, slab, fully_validate=fully_validate, direct=direct)
        )

    def _payload(self, index: int, slab: Slab | None, *, fully_validate: bool, direct: bool) -> Payload:
        """Read sample `index` once; see `payload`."""
        path = self.path(index)
        # Nothing compares a part of a file, or a mapped one, with its checksum.
        if slab is not None and not self.sharded and not self.storage.is_remote:
            return read_slab(Path(path), self.spec, slab, direct=direct)
        mappable = isinstance(path, Path) and not self.storage.is_remote
        if self.format_name == Npy.name and self.labeled and mappable and not (fully_validate or direct):
            return map_sample(Path(path), self.spec)
        if self.sharded:
            if slab is None:
                content = self._read_member(index, direct=direct)
                packed = open_packed(path, content, self.spec, labeled=self.labeled)
            else:
                read = functools.partial(self._read_member, index, direct=direct)
                length, few_reads = self.member_extents[index]["bytes"], self.storage.few_reads
                packed = open_slab(path, read, length, self.spec, slab, few_reads=few_reads)
            if fully_validate:
                packed.decode()
            else:
                packed.verify_checksum()
            return packed
        contents = self._contents(index, direct=direct)
        sample = self.format.parse(path, contents, self.spec, labeled=self.labeled)
        return CountsPayload(cut_slab(sample.counts, slab) if slab else sample.counts, sample.target)

    def _retry_damaged(self, read: Callable[[SampleDataset], _Read]) -> _Read:
        """Return `read` of these samples, which is repeated as `Storage.retry_damaged` says."""
        own = self.storage
        return own.retry_damaged(
            lambda storage: read(self if storage is own else replace(self, storage=storage))
        )

    def _read_member(
        self, index: int, start: int = 0, length: int | None = None, *, direct: bool = False
    ) -> bytes:
        """Read `length` bytes from `start` of the packed sample `index`, by default all of it."""
        offset, size, _ = self.member_extents[index].item()
        shard, member = self.names[index].split("/", 1)
        part = offset + start, size if length is None else length
        return read_member(self.root / shard, member, *part, storage=self.storage, direct=direct)

    def subset(self, index: Indices, partition: Partition | None = None) -> SampleDataset:
        """Return the samples `index` alone; `partition` is set if they are one."""
        names = tuple(self.names[i] for i in index.tolist())
        extents = None if self.extents is None else self.extents[index]
        whole = None if self.whole is None else self.whole.subset(index, partition)
        return replace(self, names=names, extents=extents, partition=partition, whole=whole)
