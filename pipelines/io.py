"""File access: atomic writes, and direct reads and writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import crc32c

from pipelines.errors import reading, writing
from pipelines.filesystem import UNSUPPORTED, open_regular, report_unsupported, sync_file, sync_folder

TEMPORARY_SUFFIX = ".tmp"
"""Suffix of a file that is being written; a leftover one can be removed safely."""

_TEMPORARY = re.compile(rf"\.(.+)\.\d+{re.escape(TEMPORARY_SUFFIX)}")
"""Name of a temporary file; the group is its final name."""

_LARGE, _BUFFER, _PIECE = 1 << 20, 1 << 20, 1 << 18
"""Bytes from which a file is written with O_DIRECT, of the buffer for that, and copied at a time."""

_BLOCK = 4096
"""Alignment of addresses and lengths for O_DIRECT; a page suits every disk."""

_thread = threading.local()

_Read = TypeVar("_Read")


class TarMember(NamedTuple):
    """A file inside a tar archive: its name, and offset and length of its content."""

    name: str
    offset: int
    bytes: int


class WrittenFile(NamedTuple):
    """A written file: its address, length, CRC-32C of the content, and members if it is a shard."""

    path: Any
    bytes: int
    crc32c: int
    members: tuple[TarMember, ...] = ()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name and rename it to `path` once it is on disk.

    The temporary name holds a random number, so that several writers of one path do not collide, even
    on other nodes, where processes may have the same ids. The last one to finish wins.

    Args:
        write: fills the open temporary file, and may read it back, as HDF5 does.

    Raises:
        AccessError: the file system reports an error. No temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.randbits(48)}{TEMPORARY_SUFFIX}")
    with writing(path):
        try:
            with open(temporary, "w+b") as file:
                write(file)
                file.flush()
                sync_file(file.fileno(), path)
            os.replace(temporary, path)
            # The rename is stored in the folder, which must be synced as well.
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_file(path: Path, *chunks: bytes | memoryview) -> WrittenFile:
    """Write `chunks` in order to the file at `path`; see `write_atomically`.

    A large file bypasses the page cache where the file system supports it: caching terabytes that
    are not read again would cost time and evict data that is.
    """
    # Small enough to stay in a core's cache between checksum and copy.
    pieces = (
        memoryview(chunk)[start : start + _PIECE]
        for chunk in chunks
        for start in range(0, len(chunk), _PIECE)
    )
    return write_stream(path, pieces, direct=sum(map(len, chunks)) >= _LARGE)


def write_stream(
    path: Path, pieces: Iterable[bytes | memoryview], *, direct: bool = False, sparse: bool = False
) -> WrittenFile:
    """Write `pieces`, consumed one by one, to the file at `path`; see `write_atomically`.

    Args:
        pieces: content of the file; an exception from them leaves no file.
        direct: bypass the page cache, where the file system supports it.
        sparse: leave holes for zeros, which take no space where the file system supports it.
    """
    length = checksum = 0

    def measured() -> Iterator[bytes | memoryview]:
        nonlocal length, checksum
        for piece in pieces:
            length, checksum = length + len(piece), crc32c.crc32c(piece, checksum)
            yield piece

    def write(file: BinaryIO) -> None:
        if sparse:
            _write_sparse(file, measured())
        elif direct:
            _write_direct(file.fileno(), measured())
        else:
            file.writelines(measured())

    write_atomically(path, write)
    return WrittenFile(path, length, checksum)


def _write_sparse(file: BinaryIO, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` to an empty file, without blocks of zeros."""
    zeros = bytes(_BLOCK)
    for piece in pieces:
        for start in range(0, len(piece), _BLOCK):
            block = bytes(piece[start : start + _BLOCK])
            if block == zeros:
                file.seek(_BLOCK, os.SEEK_CUR)
            else:
                file.write(block)
    file.truncate()


def _write_direct(descriptor: int, pieces: Iterable[bytes | memoryview]) -> None:
    """Write `pieces` to an empty file, with O_DIRECT where the file system supports it."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)

    def write_all(content: memoryview) -> None:
        while content:
            try:
                content = content[os.write(descriptor, content) :]
            except OSError:
                if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                    raise
                # Some file systems accept the flag and then refuse to write, with various errors.
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)

    if not hasattr(_thread, "buffer"):
        _thread.buffer = mmap.mmap(-1, _BUFFER)
    buffer, filled = memoryview(_thread.buffer), 0
    for rest in pieces:
        while rest:
            part = rest[: _BUFFER - filled]
            buffer[filled : filled + len(part)] = part
            filled, rest = filled + len(part), rest[len(part) :]
            if filled == _BUFFER:
                write_all(buffer)
                filled = 0
    aligned = filled // _BLOCK * _BLOCK
    write_all(buffer[:aligned])
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    write_all(buffer[aligned:filled])


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files of killed writers from `folder`; no writer may be active there."""
    for path in folder.iterdir():
        if final_name(path.name):
            path.unlink()


def final_name(name: str) -> str | None:
    """Return the final name of the temporary file `name`, or None if it is not one of `write_atomically`."""
    found = _TEMPORARY.fullmatch(name)
    return found and found[1]


def read_file(path: Path, *, direct: bool = False) -> bytes:
    """Return the content of the file at `path`.

    Args:
        direct: bypass the page cache, where the file system supports it.

    Raises:
        DataError: it cannot be read, or is a folder, FIFO, socket or device.
    """

    def read() -> bytes:
        content = read_direct(path) if direct else None
        if content is not None:
            return content
        with open(open_regular(path), "rb") as file:
            return file.read()

    with reading(path):
        return retry_stale(read)


class OpenFile:
    """A file that stays open for reading as long as this object exists."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = open_regular(path)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes from `offset`, fewer only at the end of the file."""
        parts: list[bytes] = []
        while length and (part := os.pread(self._descriptor, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def retry_stale(read: Callable[[], _Read]) -> _Read:
    """Return `read()`, called again if it fails because NFS has replaced the file since it was opened."""
    try:
        return read()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return read()


def read_direct(path: Path, offset: int = 0, length: int | None = None) -> bytes | None:
    """Read a part of the file at `path` with O_DIRECT.

    Args:
        offset: first byte.
        length: number of bytes, fewer if the file ends before; None for all.

    Returns:
        The bytes, or None if this fails: a read through the page cache then gives them, or the reason.
    """
    try:
        descriptor = open_regular(path, os.O_DIRECT)
        try:
            end = os.fstat(descriptor).st_size if length is None else offset + length
            start = offset // _BLOCK * _BLOCK
            needed = end - start
            # A memory map starts at a page. One more block than needed detects the end of the file.
            with mmap.mmap(-1, (needed // _BLOCK + 1) * _BLOCK) as buffer, memoryview(buffer) as view:
                filled = 0
                while filled < needed and (count := os.preadv(descriptor, [view[filled:]], start + filled)):
                    filled += count
                return bytes(view[offset - start : min(filled, needed)])
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            report_unsupported(path, "reading with O_DIRECT", error, "it is read through the page cache")
        return None


def map_file(path: Path) -> mmap.mmap | bytes:
    """Return the content of the file at `path`, mapped into memory, or read where that is refused.

    Raises:
        DataError: it cannot be read, or is a folder, FIFO, socket or device.
    """
    with reading(path), open(open_regular(path), "rb") as file:
        # An empty file cannot be mapped.
        size = os.fstat(file.fileno()).st_size
        if size:
            try:
                # FUSE refuses shared maps of files that it does not cache, and no private ones.
                return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            except OSError as error:
                report_unsupported(path, "mapping files into memory", error, "they are read instead")
        return file.read()
