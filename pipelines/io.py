"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import resource
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import crc32c

from pipelines.errors import AccessError

TEMPORARY_SUFFIX = ".tmp"
"""The suffix of a file that is being written; one that is left over is safe to remove."""

LOCK_FILE = ".lock"
"""The file that a writer of a folder locks: NFS and Lustre carry no lock on the folder itself to other nodes.

It stays: to remove it would take it from under somebody who waits for it."""

_TEMPORARY = re.compile(rf"\.(.+)\.\d+{re.escape(TEMPORARY_SUFFIX)}")
"""Its name, with the one that it is to get."""


_LARGE, _SCRATCH, _PIECE = 1 << 20, 1 << 20, 1 << 18
"""Bytes from which a file is large, of the buffer that it passes through, and of what is copied at once."""

_BLOCK = 4096
"""What O_DIRECT wants addresses and lengths to be multiples of; a page suits every disk."""

_scratch = threading.local()


class TarMember(NamedTuple):
    """A file inside a file: its name, and where its bytes start and how many they are."""

    name: str
    offset: int
    bytes: int


class WrittenFile(NamedTuple):
    """A file as it was written: its path, its length, the CRC-32C of its content, and its members if any."""

    path: Path
    bytes: int
    crc32c: int
    members: tuple[TarMember, ...] = ()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a temporary file beside `path`, and give it that name once it is on disk.

    The temporary name holds a number drawn for it, so that several writers of one path do not meet, on
    other nodes too, where processes may have the same ids; the last one to finish wins. AccessError
    where the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.randbits(48)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise AccessError.writing(path, error) from error
        raise
    # The rename lives in the directory, which has its own place on the disk.
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise AccessError.writing(path, error) from error


def write_chunks(path: Path, *chunks: bytes | memoryview) -> WrittenFile:
    """Write `chunks` one after the other to the file at `path`, as `write_atomically` does.

    A large file goes past the page cache where the file system lets it: a copy of terabytes that
    nobody reads again would only cost time and drive out what others do read.
    """
    length, checksum = sum(len(chunk) for chunk in chunks), 0

    def pieces() -> Iterator[memoryview]:
        """The chunks in pieces, which the checksum leaves in a core's cache for whoever copies them."""
        nonlocal checksum
        checksum = 0
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                checksum = crc32c.crc32c(piece, checksum)
                yield piece

    def write(file: BinaryIO) -> None:
        if length < _LARGE or not _write_direct(file.fileno(), pieces()):
            file.writelines(pieces())

    write_atomically(path, write)
    return WrittenFile(path, length, checksum)


def write_stream(path: Path, pieces: Iterable[bytes]) -> WrittenFile:
    """Write `pieces`, asked for one by one, to the file at `path`, as `write_atomically` does.

    Whatever they raise leaves nothing behind.
    """
    length = checksum = 0

    def write(file: BinaryIO) -> None:
        nonlocal length, checksum
        for piece in pieces:
            length, checksum = length + len(piece), crc32c.crc32c(piece, checksum)
            file.write(piece)

    write_atomically(path, write)
    return WrittenFile(path, length, checksum)


def _write_direct(descriptor: int, pieces: Iterable[memoryview]) -> bool:
    """Write `pieces` to an empty file with O_DIRECT; False, and nothing written, where there is none."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return False
    if not hasattr(_scratch, "map"):
        _scratch.map = mmap.mmap(-1, _SCRATCH)
    scratch, filled, length = memoryview(_scratch.map), 0, 0
    try:
        for rest in pieces:
            length += len(rest)
            while rest:
                part = rest[: _SCRATCH - filled]
                scratch[filled : filled + len(part)] = part
                filled, rest = filled + len(part), rest[len(part) :]
                if filled == _SCRATCH:
                    _write_all(descriptor, scratch)
                    filled = 0
        _write_all(descriptor, scratch[: -(-filled // _BLOCK) * _BLOCK])
        os.ftruncate(descriptor, length)
    except OSError as error:
        # Some file systems take the flag and then refuse the first write.
        if error.errno != errno.EINVAL or os.fstat(descriptor).st_size > 0:
            raise
        return False
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return True


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left in `folder`; none may be at work there."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if final_name(entry.name):
                os.unlink(entry.path)


def final_name(name: str) -> str | None:
    """The name for which `name` stands until the file is whole, if `write_atomically` gave it one."""
    found = _TEMPORARY.fullmatch(name)
    return found and found[1]


@contextlib.contextmanager
def locked(folder: Path, wait: Callable[[], object]) -> Iterator[int]:
    """The right to write into `folder`, until the body ends, as a file descriptor.

    Whoever inherits the descriptor keeps the right if this process is killed. Where another process
    has it, `wait()` is called, and if it returns, waited. A file system without locks gives the right
    to everyone. AccessError where there is none to be had.
    """
    path = folder / LOCK_FILE
    descriptor = _open_lock(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno == errno.EBADF:
                fault = "was left by another user's run, and cannot be locked"
                raise AccessError(path, fault, "remove it while nobody writes there") from error
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise AccessError.writing(path, error) from error
        yield descriptor
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """The file at `path`, there or made, as a descriptor that can be locked."""
    try:
        # Open for writing, which NFS asks for; and for whoever may write into the folder.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, os.stat(path.parent).st_mode & 0o666)
        return descriptor
    except PermissionError as refused:
        try:
            return os.open(path, os.O_RDONLY)
        except OSError:
            raise AccessError.writing(path, refused) from refused
    except OSError as error:
        raise AccessError.writing(path, error) from error


def read_file(path: Path, *, direct: bool = False) -> bytes:
    """The content of the file at `path`; AccessError where it cannot be read.

    With `direct` it goes past the page cache, where the file system lets it.
    """
    try:
        content = read_direct(path) if direct else None
        return path.read_bytes() if content is None else content
    except OSError as error:
        raise AccessError.reading(path, error) from error


def read_direct(path: Path, offset: int = 0, length: int | None = None) -> bytes | None:
    """The `length` bytes at `offset` of the file at `path`, read with O_DIRECT; None where there is none.

    By default all bytes that there are. Fewer than `length` where the file ends before. OSError
    where it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    try:
        end = os.fstat(descriptor).st_size if length is None else offset + length
        start = offset // _BLOCK * _BLOCK
        wanted = end - start
        # A map of its own, since its start is a page's; a block more, to see the end of the file.
        with mmap.mmap(-1, (wanted // _BLOCK + 1) * _BLOCK) as scratch, memoryview(scratch) as view:
            filled = 0
            while filled < wanted and (count := os.preadv(descriptor, [view[filled:]], start + filled)):
                filled += count
            return bytes(view[offset - start : min(filled, wanted)])
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    finally:
        os.close(descriptor)


def raise_open_file_limit(count: int) -> int:
    """Have the system let this process have `count` open, or as many as it does let it; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(allowed, soft)
