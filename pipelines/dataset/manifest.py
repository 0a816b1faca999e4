"""What a folder of samples holds, in one file: names, lengths and checksums.

`manifest.jsonl` lies in the folder. Its first line is an object: `manifest` (the version, 2),
`format` (a key of FORMATS), `size` and `channels` (the shape of every sample), `samples` (how many
there are). Then one array for each sample, or for each shard of packed ones, in order:

    ["univ_000", [["_label.npy", 144, "0e8bb71c"], ["_data.npy", 16777344, "9d4bd0a1"]], [2829480, "1f6c..."]]

the stem; for each of its files the end of the name, the length in bytes, and the CRC-32C of the
content in hexadecimal, and of a shard its members, each with its name, where it starts and how long
it is; and, for what was made from other files, their length in bytes and a digest of their names,
lengths and times of last change, else null. (Version 1 had the latest of the times in its place,
which matches no digest: samples of that kind are read, and made again by a conversion.) Whoever opens
the folder reads this one file and lists nothing, which is what half a million files on a parallel
file system ask for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import AccessError, DataError
from pipelines.io import TarMember, WrittenFile, read_file, write_chunks
from pipelines.sample import SampleSpec

MANIFEST = "manifest.jsonl"
_VERSION, _READABLE = 2, (1, 2)


class FileRecord(NamedTuple):
    """A file of an entry: the end of its name, its length, the CRC-32C of its content, its members if any."""

    suffix: str
    bytes: int
    crc32c: int
    members: tuple[TarMember, ...] = ()

    def to_json(self) -> list[Any]:
        """As a line of the manifest has it."""
        line: list[Any] = [self.suffix, self.bytes, f"{self.crc32c:08x}"]
        return [*line, [list(member) for member in self.members]] if self.members else line

    @staticmethod
    def from_json(line: Any) -> FileRecord:
        """The inverse; ValueError or TypeError for anything else."""
        suffix, length, crc, *more = line
        (found,) = more or [()]
        members = tuple(TarMember(str(name), _count(offset), _count(size)) for name, offset, size in found)
        return FileRecord(str(suffix), _count(length), _count(int(crc, 16)), members)


class SourceFingerprint(NamedTuple):
    """What tells whether the files that an entry was made from have changed since.

    bytes: of all files. digest: of all that was asked of them, in hexadecimal.
    """

    bytes: int
    digest: str

    @staticmethod
    def from_files(
        names: Iterable[str], paths: Iterable[Path], stat: Callable[[Path], os.stat_result] = os.stat
    ) -> SourceFingerprint:
        """Of what is known as `names`, in this order, in the files `paths`, of each of which `stat` is asked.

        AccessError where one is not there.
        """
        try:
            found = [(path.name, stat(path)) for path in paths]
        except OSError as error:
            raise AccessError.reading(error.filename, error) from error
        told = [list(names), [(name, file.st_size, file.st_mtime_ns) for name, file in found]]
        digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()
        return SourceFingerprint(sum(file.st_size for _, file in found), digest)


class Entry(NamedTuple):
    """A sample, or a shard of them: its name, its files, and what it was made from, if that is a file.

    In a journal, one without files is a sample or shard that was begun and not finished.
    """

    name: str
    files: tuple[FileRecord, ...]
    source: SourceFingerprint | None = None

    @staticmethod
    def from_written(
        name: str, written: Sequence[WrittenFile], source: SourceFingerprint | None = None
    ) -> Entry:
        """The entry `name` of the files `written`."""
        files = (FileRecord(file.path.name.removeprefix(name), *file[1:]) for file in written)
        return Entry(name, tuple(files), source)

    @property
    def samples(self) -> int:
        """How many it holds."""
        return len(self.members) or min(1, len(self.files))

    @property
    def members(self) -> list[str]:
        """The names of the members, if it is a shard."""
        return [member.name for file in self.files for member in file.members]

    def to_json(self) -> list[Any]:
        """As a line of the manifest has it."""
        files = [file.to_json() for file in self.files]
        return [self.name, files, list(self.source) if self.source else None]

    @staticmethod
    def from_json(line: Any) -> Entry:
        """The inverse; ValueError, TypeError or OverflowError for anything else."""
        name, records, source = line
        files = tuple(map(FileRecord.from_json, records))
        if not isinstance(name, str) or "/" in name or any("/" in file.suffix for file in files):
            raise ValueError("a name that is none")
        if source is not None:
            length, digest = source
            source = SourceFingerprint(int(length), str(digest))
        return Entry(name, files, source)

    def files_in(self, folder: Path) -> Iterator[tuple[Path, FileRecord]]:
        """Each file's path, if it is in `folder`, with what stands here of it."""
        return ((folder / (self.name + file.suffix), file) for file in self.files)

    def is_complete_in(self, folder: Path) -> bool:
        """Whether all its files are in `folder`, each of the length that stands here."""
        try:
            there = all(path.stat().st_size == file.bytes for path, file in self.files_in(folder))
            return there and bool(self.files)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise AccessError.reading(folder / self.name, error) from error


@dataclass(frozen=True, slots=True)
class Manifest:
    """A folder's samples.

    format_name: the name of their format.
    spec: their shape.
    entries: one a sample, or one a shard, in order.
    """

    format_name: str
    spec: SampleSpec
    entries: tuple[Entry, ...]

    def save(self, folder: Path) -> None:
        """Write this into `folder`, whole or not at all."""
        header = {
            "manifest": _VERSION,
            "format": self.format_name,
            "size": self.spec.size,
            "channels": self.spec.channels,
            "samples": sum(entry.samples for entry in self.entries),
        }
        lines = [json.dumps(header), *(json.dumps(entry.to_json()) for entry in self.entries), ""]
        write_chunks(folder / MANIFEST, "\n".join(lines).encode())

    @staticmethod
    def load(folder: Path) -> Manifest | None:
        """The manifest in `folder`, or None; DataError where it is damaged."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        entries: list[Entry] = []
        try:
            header, *lines = read_file(path).decode().splitlines()
            fields = json.loads(header)
            if fields["manifest"] not in _READABLE:
                raise DataError(path, f"has version {fields['manifest']}", f"this program reads {_READABLE}")
            entries.extend(Entry.from_json(json.loads(line)) for line in lines)
            manifest = Manifest(
                str(fields["format"]),
                SampleSpec(int(fields["size"]), int(fields["channels"])),
                tuple(entries),
            )
            missing = int(fields["samples"]) - sum(entry.samples for entry in entries)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            fault = f"a line after {len(entries)} samples is no line of a manifest ({error})"
            raise DataError(path, fault, _REMEDY) from error
        if missing:
            raise DataError(path, f"is cut off: {missing} samples are missing", _REMEDY)
        if len({entry.name for entry in entries}) != len(entries):
            raise DataError(path, "has a sample twice", _REMEDY)
        return manifest


def _count(value: Any) -> int:
    """`value` as an int64 of at least 0; ValueError, TypeError or OverflowError for what is none."""
    if not 0 <= (count := int(value)) < 1 << 63:
        raise ValueError(f"the number {count}")
    return count


_REMEDY = "remove it, and convert again or write it anew with python -m preprocess.verify --write"
