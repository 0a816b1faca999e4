"""Files of the file system."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import MissingError, UnreadableError, reading, remedy_for_link, writing
from pipelines.filesystem import is_present, open_regular, raise_open_file_limit
from pipelines.io import (
    OpenFile,
    WrittenFile,
    read_direct,
    read_file,
    retry_stale,
    write_file,
    write_stream,
)
from pipelines.storage.base import FileState, Storage
from pipelines.storage.location import Location

_MAX_OPEN_FILES = 16384
"""Files that a process keeps open, if the system allows it: more than the published set has shards."""

_FD_RESERVE = 512
"""Other files that the process may open."""


@dataclass(frozen=True)
class LocalStorage(Storage):
    """Files by their paths."""

    def read(self, path: Location, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        return read_file(Path(path), direct=direct)

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        """See `Storage`; the file stays open for further reads."""
        path = Path(path)

        def read_cached() -> bytes:
            handle = _open_files()(path)
            try:
                return handle.read(offset, length)
            except OSError:
                clear_open_files()
                raise

        with reading(path):
            content = read_direct(path, offset, length) if direct else None
            return retry_stale(read_cached) if content is None else content

    def open(self, path: Location) -> BinaryIO:
        """See `Storage`."""
        with reading(path):
            return open(open_regular(path), "rb")

    def state(self, path: Location) -> FileState:
        """See `Storage`."""
        with reading(path):
            found = os.stat(path)
        return FileState(found.st_size, found.st_mtime_ns)

    def list(self, folder: Location) -> list[str]:
        """See `Storage`."""
        try:
            with os.scandir(Path(folder)) as entries:
                return sorted(entry.name for entry in entries)
        except OSError as error:
            remedy = remedy_for_link(folder, error) or "check the path, and give a folder of samples"
            kind = MissingError if isinstance(error, FileNotFoundError) else UnreadableError
            raise kind(folder, f"cannot be listed ({error.strerror})", remedy) from error

    def is_present(self, path: Location) -> bool:
        """See `Storage`."""
        return is_present(Path(path))

    def write(self, path: Location, *chunks: bytes | memoryview) -> WrittenFile:
        """See `Storage`; large files bypass the page cache where the file system supports it."""
        return write_file(Path(path), *chunks)

    def write_stream(
        self, path: Location, pieces: Iterable[bytes | memoryview], *, sparse: bool = False
    ) -> WrittenFile:
        """See `Storage`."""
        return write_stream(Path(path), pieces, sparse=sparse)

    def remove(self, path: Location) -> None:
        """See `Storage`."""
        with writing(path):
            Path(path).unlink(missing_ok=True)


LOCAL = LocalStorage()


def clear_open_files() -> None:
    """Close all files that `LocalStorage.read_range` keeps open; they may have been replaced."""
    _open_files().cache_clear()


@functools.cache
def _open_files() -> functools._lru_cache_wrapper[OpenFile]:
    """Return the cache of open files: on a parallel file system, opening takes longer than reading a sample.

    A handle that the cache drops is closed when the last thread that reads from it is done.
    """
    limit = raise_open_file_limit(_MAX_OPEN_FILES + _FD_RESERVE) - _FD_RESERVE
    return functools.lru_cache(maxsize=max(limit, _FD_RESERVE // 2))(OpenFile)
