"""The manifest of a folder of samples: names, lengths and checksums of all files.

`manifest.jsonl` lies in the folder. Its first line is an object: `manifest` (the version, 2),
`format` (a key of FORMATS), `size` and `channels` (the shape of every sample), `samples` (their
number). Then one array for each sample, or for each shard of packed ones, in order:

    ["univ_000", [["_label.npy", 144, "0e8bb71c"], ["_data.npy", 16777344, "9d4bd0a1"]], [2829480, "1f6c..."]]

The entry's name; for each of its files the suffix of the name, the length in bytes, the CRC-32C of the
content in hexadecimal and, of a shard, its members, each with name, offset and length; and, for an
entry made from other files, their length in bytes and a digest of their names, lengths and times of
last change (ETags of objects), else null. Opening the folder reads this file and lists nothing, which
matters with half a million files on a parallel file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipelines.errors import DataError, MissingError
from pipelines.formats.signatures import SIGNATURE_BYTES, recognize
from pipelines.io import TarMember, WrittenFile
from pipelines.sample import SampleSpec
from pipelines.storage.base import FileState
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of

MANIFEST = "manifest.jsonl"
_VERSION = 2
_REMEDY = "remove it and regenerate it with python -m preprocess.verify --write"


class FileRecord(NamedTuple):
    """A file of an entry: the suffix of its name, length, CRC-32C of the content, and a shard's members."""

    suffix: str
    bytes: int
    crc32c: int
    members: tuple[TarMember, ...] = ()

    def to_json(self) -> list[Any]:
        """Return the record as a line of the manifest holds it."""
        line: list[Any] = [self.suffix, self.bytes, f"{self.crc32c:08x}"]
        return [*line, [list(member) for member in self.members]] if self.members else line

    @staticmethod
    def from_json(line: Any) -> FileRecord:
        """Parse what `to_json` returned; ValueError or TypeError for anything else."""
        suffix, length, crc, *more = line
        (found,) = more or [()]
        members = tuple(TarMember(str(name), _count(offset), _count(size)) for name, offset, size in found)
        return FileRecord(str(suffix), _count(length), _count(int(crc, 16)), members)


class SourceFingerprint(NamedTuple):
    """State of the files that an entry was made from, compared to detect that they have changed.

    Attributes:
        bytes: length of all files together.
        digest: BLAKE2b digest of their names, lengths and times of last change or ETags, in hexadecimal.
    """

    bytes: int
    digest: str

    @staticmethod
    def from_files(
        names: Iterable[str],
        paths: Iterable[Location],
        state_of: Callable[[Location], FileState] | None = None,
    ) -> SourceFingerprint:
        """Return the fingerprint of the samples `names`, in this order, in the files `paths`.

        Raises:
            UnreadableError: the state of one of them cannot be read.
        """
        states = [(path.name, *(state_of or storage_of(path).state)(path)) for path in paths]
        content = json.dumps([list(names), states]).encode()
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        return SourceFingerprint(sum(length for _, length, _ in states), digest)


class Entry(NamedTuple):
    """A sample or a shard: its name, its files, and the fingerprint of its source, if that is a file.

    In a journal, an entry without files is a sample or shard that was begun and not finished.
    """

    name: str
    files: tuple[FileRecord, ...]
    source: SourceFingerprint | None = None

    @staticmethod
    def from_written(
        name: str, written: Sequence[WrittenFile], source: SourceFingerprint | None = None
    ) -> Entry:
        """Return the entry `name` of the files `written`."""
        files = (FileRecord(file.path.name.removeprefix(name), *file[1:]) for file in written)
        return Entry(name, tuple(files), source)

    @property
    def samples(self) -> int:
        """Number of samples that it holds."""
        return len(self.members) or min(1, len(self.files))

    @property
    def members(self) -> list[str]:
        """Names of the members of a shard."""
        return [member.name for file in self.files for member in file.members]

    def to_json(self) -> list[Any]:
        """Return the entry as a line of the manifest holds it."""
        files = [file.to_json() for file in self.files]
        return [self.name, files, list(self.source) if self.source else None]

    @staticmethod
    def from_json(line: Any) -> Entry:
        """Parse what `to_json` returned; ValueError, TypeError or OverflowError for anything else."""
        name, records, source = line
        files = tuple(map(FileRecord.from_json, records))
        if not isinstance(name, str) or "/" in name or any("/" in file.suffix for file in files):
            raise ValueError("an invalid file name")
        if source is not None:
            length, digest = source
            source = SourceFingerprint(int(length), str(digest))
        return Entry(name, files, source)

    def files_in(self, folder: Location) -> Iterator[tuple[Location, FileRecord]]:
        """Yield the path in `folder` and the record of each file."""
        return ((folder / (self.name + file.suffix), file) for file in self.files)

    def is_complete_in(self, folder: Location) -> bool:
        """Return True if all its files are in `folder` with the recorded lengths."""
        storage = storage_of(folder)
        with contextlib.suppress(MissingError):
            complete = all(storage.state(path).bytes == file.bytes for path, file in self.files_in(folder))
            return complete and bool(self.files)
        return False


@dataclass(frozen=True, slots=True)
class Manifest:
    """The samples of a folder.

    Attributes:
        format_name: a key of FORMATS.
        spec: shape of every sample.
        entries: one for each sample or shard, in order.
        digest: of the file that it was loaded from.
    """

    format_name: str
    spec: SampleSpec
    entries: tuple[Entry, ...]
    digest: str = field(default="", compare=False)

    def save(self, folder: Location) -> None:
        """Write the manifest of `folder` atomically."""
        header = {
            "manifest": _VERSION,
            "format": self.format_name,
            "size": self.spec.size,
            "channels": self.spec.channels,
            "samples": sum(entry.samples for entry in self.entries),
        }
        lines = [json.dumps(header), *(json.dumps(entry.to_json()) for entry in self.entries), ""]
        path = folder / MANIFEST
        storage_of(path).write(path, "\n".join(lines).encode())

    @staticmethod
    def load(folder: Location) -> Manifest | None:
        """Return the manifest of `folder`, or None if it has none; DataError if it is damaged."""
        path = folder / MANIFEST
        try:
            return storage_of(path).retry_damaged(lambda storage: Manifest._parse(path, storage.read(path)))
        except MissingError:
            return None

    @staticmethod
    def _parse(path: Location, content: bytes) -> Manifest:
        """Return the manifest that `content` of the file `path` is; DataError if it is damaged."""
        if (kind := recognize(content[:SIGNATURE_BYTES])) not in (None, "text", "a JSON document"):
            raise DataError(path, f"holds {kind} instead of a manifest", "check the address; regenerate it")
        entries: list[Entry] = []
        try:
            # An editor may have added a byte-order mark, or empty lines.
            header, *lines = filter(str.strip, content.decode("utf-8-sig").splitlines())
            fields = json.loads(header)
            if fields["manifest"] != _VERSION:
                raise DataError(path, f"has version {fields['manifest']}, not {_VERSION}", _REMEDY)
            entries.extend(Entry.from_json(json.loads(line)) for line in lines)
            spec = SampleSpec(int(fields["size"]), int(fields["channels"]))
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            manifest = Manifest(str(fields["format"]), spec, tuple(entries), digest)
            missing = int(fields["samples"]) - sum(entry.samples for entry in entries)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            fault = f"the line after {len(entries)} samples is not valid ({error})"
            raise DataError(path, fault, _REMEDY) from error
        if missing:
            raise DataError(path, f"is cut off: {missing} samples are missing", _REMEDY)
        if len({entry.name for entry in entries}) != len(entries):
            raise DataError(path, "lists a sample twice", _REMEDY)
        return manifest


def _count(value: Any) -> int:
    """Return `value` as an int64 of at least 0; ValueError, TypeError or OverflowError for anything else."""
    if not 0 <= (count := int(value)) < 1 << 63:
        raise ValueError(f"the number {count}")
    return count
