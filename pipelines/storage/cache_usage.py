"""The bytes that a cache holds: their count in its file `usage`, and room for more.

The count is the sum of the lengths of all files of entries, in whole blocks, also of those being written.
Files grow, are renamed and removed with `usage` locked. Meanwhile it holds no count, so that the next process
counts them if one is killed. They are also counted after a restart of the system, and when the cache is full,
to remove what killed processes were writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

USAGE, DATASET, NEW = "usage", "dataset", ".new"
"""Names in the folder of a cache, and the suffix of an entry that is being written; see cache_folder.py."""

_BLOCK = 4096
"""Bytes that file systems allocate at a time, usually."""

_SLACK, _MAX_SLACK = 0.05, 1 << 30
"""Part of the cache that is freed at once, as finding what to remove takes time; and bytes of it at most."""

_COUNT_SECONDS = 600.0
"""Seconds between two counts of all entries of a full cache, at least."""

_LOCK_SECONDS = 20.0
"""Duration after which a process that holds a lock counts as hung."""


class Usage:
    """The count of the cache in `folder`, whose file is open as `descriptor` and locked; see `open_usage`.

    Attributes:
        bytes: Bytes in use.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder, self._descriptor, self._changed = folder, descriptor, False
        try:
            boot, total, counted = os.pread(descriptor, 100, 0).split()
            self.bytes, self._counted, known = int(total), float(counted), boot == _boot()
        except ValueError:
            known = False
        if not known:
            self._count()

    def save(self) -> None:
        """Write the count."""
        if self._changed:
            os.pwrite(self._descriptor, b"%s %20d %20.3f" % (_boot(), self.bytes, self._counted), 0)

    def resize(self, descriptor: int, length: int) -> None:
        """Make the file that is open as `descriptor` `length` bytes long."""
        change = blocks(length) - blocks(os.fstat(descriptor).st_size)
        self._begin()
        os.ftruncate(descriptor, length)
        self.bytes += change

    def remove(self, path: str) -> None:
        """Remove the file `path` of an entry, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            length = os.lstat(path).st_size
            self._begin()
            os.unlink(path)
            self.bytes -= blocks(length)

    def make_room(self, needed: int, size: int) -> bool:
        """Return whether `needed` bytes more are at most `size`, after removing what no process uses.

        The data set that has not been used for longest loses its entries first.
        """
        if self.bytes + needed > size and time.monotonic() - self._counted > _COUNT_SECONDS:
            self._count()
        if self.bytes + needed <= size:
            return True
        goal = min(size - needed, size - min(int(_SLACK * size), _MAX_SLACK))
        used = {path: path.stat().st_mtime for path in self._folder.glob(f"*/{DATASET}")}
        for path in sorted(used, key=used.__getitem__):
            with open(path, "rb") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for entry in _entries(path.parent):
                    if self.bytes <= goal:
                        return True
                    self.remove(entry.path)
        return self.bytes + needed <= size

    def _count(self) -> None:
        """Count all entries, and remove what killed processes were writing."""
        self._begin()
        total = 0
        for path in self._folder.glob(f"*/{DATASET}"):
            for entry in _entries(path.parent):
                if not (entry.name.endswith(NEW) and _remove_unlocked(entry.path)):
                    total += blocks(entry.stat(follow_symlinks=False).st_size)
        self.bytes, self._counted = total, time.monotonic()

    def _begin(self) -> None:
        """Invalidate the file until `save`."""
        if not self._changed:
            self._changed = True
            os.pwrite(self._descriptor, b"-", 0)


@contextlib.contextmanager
def open_usage(folder: Path) -> Iterator[Usage]:
    """Yield the count of the cache in `folder`, whose files no other process changes meanwhile."""
    with open(os.open(folder / USAGE, os.O_RDWR | os.O_CREAT, 0o666), "rb") as file:
        lock(file.fileno(), fcntl.LOCK_EX)
        usage = Usage(folder, file.fileno())
        yield usage
        usage.save()


def lock(descriptor: int, kind: int) -> None:
    """Lock an open file, as flock with `kind` does.

    Raises:
        TimeoutError: Another process has held the lock for long; it may be stopped.
    """
    start, pause = time.monotonic(), 1e-4
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - start > _LOCK_SECONDS:
                raise TimeoutError("another process holds its lock, and may have been stopped") from None
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def blocks(length: int) -> int:
    """Return the bytes that a file of `length` bytes takes on the disk."""
    return -(-length // _BLOCK) * _BLOCK


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the files of the entries of the data set in `folder`."""
    with os.scandir(folder) as groups:
        for group in groups:
            if group.is_dir():
                with os.scandir(group) as entries:
                    yield from entries


def _remove_unlocked(path: str) -> bool:
    """Remove the file `path` unless it is locked; return whether it was removed."""
    with open(path, "rb") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    return False


@functools.cache
def _boot() -> bytes:
    """Return what identifies this start of the system."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
