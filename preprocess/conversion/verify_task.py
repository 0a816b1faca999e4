"""The task of checking samples against what is noted of them, and against what a sample is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
from zlib_ng import zlib_ng

from pipelines.dataset.dataset import SampleDataset, dataset_from_shards
from pipelines.dataset.manifest import Entry, FileRecord
from pipelines.errors import DataError
from pipelines.formats.packed.format import MEMBER_SUFFIX, PackedFormat, sample_members
from pipelines.formats.registry import FORMATS
from pipelines.io import WrittenFile, read_file
from pipelines.sample import Sample, SampleSpec

_ROUNDING = 1e-6
"""How far beyond 1 a target in float32 may be and still mean 1."""


@dataclass(frozen=True, slots=True)
class Check:
    """Of samples (size, size, size, channels) in the format `format_name`, in `folder`."""

    folder: str
    format_name: str
    size: int
    channels: int

    def __call__(self, job: tuple[str, Any]) -> dict[str, Any]:
        """Check the sample or the shard with the stem job[0], and its files against job[1], an Entry or None.

        Answers {"faults": [[check, line], ...], "entry": what the files are now, None where one
        cannot be read, "samples": of each sound sample its stem, a word that two samples share if
        their counts are the same, and its target}.
        """
        stem, noted = job
        folder, format_name = Path(self.folder), FORMATS[self.format_name]
        there = [
            part
            for part in (*format_name.extra_suffixes, *format_name.suffixes)
            if (folder / (stem + part)).exists()
        ]
        expected = Entry.from_json(noted) if noted is not None else None
        wanted = [part.suffix for part in expected.files] if expected else format_name.suffixes
        missing = (folder / (stem + part) for part in wanted if part not in there)
        faults = [("files", f"{path}: is not there; convert it again") for path in missing]
        entry, split, samples = None, None, []
        try:
            contents = {part: read_file(folder / (stem + part)) for part in there}
            entry = self._entry(stem, contents)
            if expected:
                faults += _against(folder, expected, entry)
            split = None if faults else self._split(entry)
        except DataError as error:
            faults.append(("content", str(error)))
        if split:
            for index in range(len(split)):
                try:
                    sample = format_name.parse(split.path(index), _of(split, index, contents), split.spec)
                except DataError as error:
                    faults.append(("content", str(error)))
                else:
                    faults += _of_target(split.path(index), sample)
                    samples.append((split.sample_id(index), _identity(sample), sample.target.tolist()))
        return {"faults": faults, "entry": entry.to_json() if entry else None, "samples": samples}

    def _entry(self, stem: str, contents: Mapping[str, bytes]) -> Entry:
        """What the files of `stem` are, whose `contents` these are by the ends of their names."""
        folder = Path(self.folder)
        written = [
            WrittenFile(folder / (stem + suffix), len(content), crc32c.crc32c(content))
            for suffix, content in contents.items()
        ]
        if self.format_name == PackedFormat.name:
            shards = (file.path.suffix == PackedFormat.suffix for file in written)
            written = [
                file._replace(members=sample_members(file.path)) if shard else file
                for file, shard in zip(written, shards, strict=True)
            ]
        return Entry.from_written(stem, written)

    def _split(self, entry: Entry) -> SampleDataset:
        """The samples of `entry`."""
        folder, spec = Path(self.folder), SampleSpec(self.size, self.channels)
        if self.format_name == PackedFormat.name:
            return dataset_from_shards(
                folder, ((entry.name + part.suffix, part.members) for part in entry.files), spec
            )
        return SampleDataset(folder, self.format_name, (entry.name + FORMATS[self.format_name].suffix,), spec)


def _of(split: SampleDataset, index: int, contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """The contents of sample `index` among those of the files that it is in, as `Format.parse` takes them."""
    if not split.sharded:
        return {kind: contents[kind] for kind in split.format.keys}
    start, length, _ = split.member_extents[index].item()
    return {MEMBER_SUFFIX: contents[PackedFormat.suffix][start : start + length]}


def _of_target(path: Path, sample: Sample) -> Iterator[tuple[str, str]]:
    if not (np.abs(sample.target) <= 1 + _ROUNDING).all():
        yield "targets", f"{path}: the target {sample.target.tolist()} is not within -1 to 1"


def _against(folder: Path, noted: Entry, found: Entry) -> Iterator[tuple[str, str]]:
    there: dict[str, FileRecord] = {part.suffix: part for part in found.files}
    for path, part in noted.files_in(folder):
        found_part = there.get(part.suffix, part)
        if found_part.bytes != part.bytes:
            yield "sizes", f"{path}: has {found_part.bytes} bytes; the manifest says {part.bytes}"
        elif found_part.crc32c != part.crc32c:
            yield "checksums", f"{path}: its CRC-32C is not the manifest's; remove it and convert again"
        elif found_part.members != part.members:
            yield "sizes", f"{path}: its members are not where the manifest says; convert it again"


def _identity(sample: Sample) -> str:
    """Two CRCs of different polynomials, 64 bits together: few enough samples never share them by chance."""
    content = np.ascontiguousarray(sample.counts).data.cast("B")
    return f"{crc32c.crc32c(content):08x}{zlib_ng.crc32(content):08x}"
