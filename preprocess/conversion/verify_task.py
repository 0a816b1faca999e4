"""The task of checking the files of an entry against its record, and their content against the format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import crc32c
import numpy as np
from zlib_ng import zlib_ng

from pipelines.dataset.manifest import Entry
from pipelines.errors import DataError
from pipelines.formats.packed.format import MEMBER_SUFFIX, PackedFormat, sample_members
from pipelines.formats.packed.tar_shard import read_member
from pipelines.formats.registry import FORMATS
from pipelines.io import WrittenFile
from pipelines.sample import Sample, SampleSpec, is_in_range
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of

_PIECE = 1 << 23
"""Bytes of a shard that are read at a time."""


class Fault(NamedTuple):
    """A line for one fault, and the check that found it."""

    check: str
    line: str


class ValidSample(NamedTuple):
    """A sample without faults; two with equal `digest` and `target` are duplicates."""

    sample_id: str
    digest: str
    target: tuple[float, ...]


@dataclass(slots=True)
class VerifyResult:
    """Result of the checks of one entry.

    Attributes:
        faults: What is wrong.
        entry: What its files are now, None where one cannot be read.
        samples: The valid samples.
        empty: Paths of the valid samples without particles.
    """

    faults: list[Fault]
    entry: Entry | None = None
    samples: list[ValidSample] = field(default_factory=list)
    empty: list[Location] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class VerifyTask:
    """Check entries of samples of `spec` in the format `format_name`, in `folder`."""

    folder: Location
    format_name: str
    spec: SampleSpec

    def __call__(self, item: tuple[str, Entry | None]) -> VerifyResult:
        """Check the entry with the name item[0]; item[1] is its record in the manifest, if there is one."""
        result = self._check(*item)
        if result.faults and storage_of(self.folder).is_remote:
            # What is damaged in the store is so a second time; a transfer that was damaged is not.
            result = self._check(*item)
        return result

    def _check(self, name: str, record: Entry | None) -> VerifyResult:
        format_, storage = FORMATS[self.format_name], storage_of(self.folder)
        paths = {suffix: self.folder / (name + suffix) for suffix in format_.written_suffixes}
        present = {suffix: path for suffix, path in paths.items() if storage.is_present(path)}
        expected = [file.suffix for file in record.files] if record else format_.suffixes
        missing = (self.folder / (name + suffix) for suffix in expected if suffix not in present)
        result = VerifyResult([Fault("files", f"{path}: is missing; convert it again") for path in missing])
        try:
            # A shard may be larger than the memory: its samples are read one by one.
            contents = {
                suffix: b"" if suffix == PackedFormat.suffix else storage.read(path)
                for suffix, path in present.items()
            }
            entry = result.entry = self._entry(name, contents)
            result.faults += _compare(self.folder, record, entry) if record else ()
            if not result.faults:
                for path, files in self._samples(entry, contents):
                    self._check_sample(path, files, result)
        except DataError as error:
            result.faults.append(Fault("content", str(error)))
        return result

    def _check_sample(self, path: Location, contents: Mapping[str, bytes], result: VerifyResult) -> None:
        """Check the sample at `path` with these `contents`, and add to the `result` of its entry."""
        format_ = FORMATS[self.format_name]
        try:
            sample = format_.parse(path, contents, self.spec)
        except DataError as error:
            result.faults.append(Fault("content", str(error)))
            return
        target = tuple(sample.target.tolist())
        if not is_in_range(sample.target):
            result.faults.append(Fault("targets", f"{path}: the target {list(target)} is not within -1 to 1"))
        if not sample.counts.any():
            result.empty.append(path)
        sample_id = path.name.removesuffix(format_.keys[-1])
        result.samples.append(ValidSample(sample_id, _digest(sample), target))

    def _samples(
        self, entry: Entry, contents: Mapping[str, bytes]
    ) -> Iterator[tuple[Location, Mapping[str, bytes]]]:
        """Yield the path of each sample of `entry`, and its contents as `Format.parse` takes them."""
        path, storage = self.folder / (entry.name + FORMATS[self.format_name].suffix), storage_of(self.folder)
        if self.format_name != PackedFormat.name:
            yield path, contents
        for file in entry.files:
            for name, offset, length in file.members:
                yield path / name, {MEMBER_SUFFIX: read_member(path, name, offset, length, storage=storage)}

    def _entry(self, name: str, contents: Mapping[str, bytes]) -> Entry:
        """Return the record of files with these `contents` by suffix."""
        written = []
        for suffix, content in contents.items():
            path = self.folder / (name + suffix)
            if suffix == PackedFormat.suffix:
                written.append(WrittenFile(path, *_checksum(path), sample_members(path)))
            else:
                written.append(WrittenFile(path, len(content), crc32c.crc32c(content)))
        return Entry.from_written(name, written)


def _checksum(path: Location) -> tuple[int, int]:
    """Return the length and the CRC-32C of the file at `path`, which may be larger than the memory."""
    storage, length, checksum = storage_of(path), 0, 0
    while piece := storage.read_range(path, length, _PIECE):
        length, checksum = length + len(piece), crc32c.crc32c(piece, checksum)
    return length, checksum


def _compare(folder: Location, record: Entry, found: Entry) -> Iterator[Fault]:
    """Yield the differences between the manifest's `record` and the files that were `found`."""
    found_files = {file.suffix: file for file in found.files}
    for path, expected in record.files_in(folder):
        file = found_files.get(expected.suffix, expected)
        if file.bytes != expected.bytes:
            yield Fault("sizes", f"{path}: has {file.bytes} bytes; the manifest says {expected.bytes}")
        elif file.crc32c != expected.crc32c:
            yield Fault(
                "checksums", f"{path}: its CRC-32C is not the manifest's; remove it and convert again"
            )
        elif file.members != expected.members:
            yield Fault("sizes", f"{path}: its members are not where the manifest says; convert it again")


def _digest(sample: Sample) -> str:
    """Return two CRCs of different polynomials, 64 bits in all: no two samples share them by chance."""
    content = np.ascontiguousarray(sample.counts).data.cast("B")
    return f"{crc32c.crc32c(content):08x}{zlib_ng.crc32(content):08x}"
