"""The contract of storage."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, TypeVar

from pipelines.io import WrittenFile
from pipelines.storage.location import Location

Result = TypeVar("Result")


class FileState(NamedTuple):
    """The length of a file in bytes, and what changes with its content: its time in ns, or its ETag."""

    bytes: int
    version: int | str


class Storage(ABC):
    """Files of one file system, bucket or web server; picklable, and safe to use in threads.

    Every method raises DataError that names the file: MissingError if there is none, UnreadableError if it
    cannot be read, AccessError if it cannot be written; or StorageError if the server cannot be used.
    """

    @property
    def is_remote(self) -> bool:
        """True if files are transferred, which takes time and may damage them."""
        return False

    @property
    def few_reads(self) -> bool:
        """True if a read costs more than some bytes that may not be needed."""
        return self.is_remote

    @property
    def lists_folders(self) -> bool:
        """True if it knows folders: `list`, and `is_present` of a folder."""
        return True

    @abstractmethod
    def read(self, path: Location, *, direct: bool = False) -> bytes:
        """Return the content of the file at `path`.

        Args:
            direct: Bypass the page cache, where there is one and the file system supports it.
        """

    @abstractmethod
    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        """Return `length` bytes from `offset` of the file at `path`, fewer only at its end; see `read`."""

    def open(self, path: Location) -> BinaryIO:
        """Return the file at `path`, open for reading in small parts."""
        return io.BufferedReader(_RangeReader(self, path))

    def read_ranges(self, path: Location, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return `read_range` of each (offset, length) in `extents`, which follow each other in the file."""
        return [self.read_range(path, *extent) for extent in extents]

    @abstractmethod
    def state(self, path: Location) -> FileState:
        """Return the state of the file at `path`."""

    @abstractmethod
    def list(self, folder: Location) -> list[str]:
        """Return the names of the files and folders in `folder`, sorted."""

    @abstractmethod
    def is_present(self, path: Location) -> bool:
        """Return whether there is a file or folder at `path`, or a symbolic link that leads nowhere."""

    def retry_damaged(self, read: Callable[[Storage], Result]) -> Result:
        """Return `read(self)`; storage whose transfers can be damaged repeats it after a DataError.

        Args:
            read: Reads from the storage that it is given, and checks what it has read.
        """
        return read(self)

    def write(self, path: Location, *chunks: bytes | memoryview) -> WrittenFile:
        """Write `chunks` in order to the file at `path`; see `write_stream`."""
        return self.write_stream(path, chunks)

    @abstractmethod
    def write_stream(
        self, path: Location, pieces: Iterable[bytes | memoryview], *, sparse: bool = False
    ) -> WrittenFile:
        """Write `pieces`, consumed one by one, to the file at `path`, which appears when it is complete.

        Args:
            path: The file; one that is there is replaced.
            pieces: Its content; an exception from them leaves no file.
            sparse: Leave holes for zeros, which take no space where the file system supports it.
        """

    @abstractmethod
    def remove(self, path: Location) -> None:
        """Remove the file at `path`; nothing happens if there is none."""


@dataclass(frozen=True)
class Layer(Storage):
    """Storage in front of `inner`, which does what a subclass leaves."""

    inner: Storage

    @property
    def is_remote(self) -> bool:
        """See `Storage`."""
        return self.inner.is_remote

    @property
    def few_reads(self) -> bool:
        """See `Storage`."""
        return self.inner.few_reads

    @property
    def lists_folders(self) -> bool:
        """See `Storage`."""
        return self.inner.lists_folders

    def read(self, path: Location, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        return self.inner.read(path, direct=direct)

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        return self.inner.read_range(path, offset, length, direct=direct)

    def state(self, path: Location) -> FileState:
        """See `Storage`."""
        return self.inner.state(path)

    def list(self, folder: Location) -> list[str]:
        """See `Storage`."""
        return self.inner.list(folder)

    def is_present(self, path: Location) -> bool:
        """See `Storage`."""
        return self.inner.is_present(path)

    def write_stream(
        self, path: Location, pieces: Iterable[bytes | memoryview], *, sparse: bool = False
    ) -> WrittenFile:
        """See `Storage`."""
        return self.inner.write_stream(path, pieces, sparse=sparse)

    def remove(self, path: Location) -> None:
        """See `Storage`."""
        self.inner.remove(path)


class _RangeReader(io.RawIOBase):
    """The file at `path` of `storage`, as `io.BufferedReader` takes it."""

    def __init__(self, storage: Storage, path: Location) -> None:
        self._storage, self._path, self._position = storage, path, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        self._position = offset + (self._storage.state(self._path).bytes if start is None else start)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._storage.read_range(self._path, self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
