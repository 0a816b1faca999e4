"""A folder on a node's own disk that keeps what was fetched of data sets, shared by the node's processes.

    cosmoflow-cache             marks the folder: one that holds anything else is refused
    usage                       bytes of all entries; see cache_usage.py
    SET/dataset                 address and version of a data set; locked (flock, shared) by every process
                                that uses it, which changes its time now and then
    SET/3f/3f8a...              an entry: a header, and the content
    SET/3f/3f8a....new          an entry that is being fetched and written, locked by the thread that does

The kernel releases the locks of a process however it ends. Entries are not synced to the disk: after a power
failure some may be damaged, which their checksums show.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import time
from pathlib import Path
from types import TracebackType

import crc32c

from pipelines.errors import ConfigError, DataError
from pipelines.filesystem import is_empty
from pipelines.io import OpenFile
from pipelines.storage.cache_usage import DATASET, NEW, blocks, lock, open_usage

MARKER = "cosmoflow-cache"
"""The file that marks a folder as a cache."""

_HEADER = struct.Struct("<8sQI16s")
_MAGIC = b"CFcache1"
"""The header of an entry: _MAGIC, length and CRC-32C of the content, and the digest of the entry's key."""

_PAUSE_SECONDS = 60.0
"""Duration for which a process keeps nothing, once the folder is full or cannot be written."""

_TOUCH_SECONDS = 600.0
"""Seconds between two changes of the time of a data set that is in use."""

_reported: set[Path] = set()
"""Folders whose first error this process has reported."""

logger = logging.getLogger(__name__)


def digest_of(*parts: object) -> bytes:
    """Return the digest that stands for `parts` in names and headers."""
    text = "\n".join(map(str, parts))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def open_cached_set(folder: Path, size: int, dataset: str) -> CachedSet | None:
    """Return the entries of `dataset` in `folder`, in use as long as they exist.

    Args:
        folder: The cache; it is created if there is none.
        size: Bytes that it may hold.
        dataset: Address and version of the data set.

    Returns:
        The entries; None after a warning if the folder cannot be used.

    Raises:
        ConfigError: The folder holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker = folder / MARKER
        if not marker.exists():
            if not is_empty(folder) and not marker.exists():
                held = min(name for name in os.listdir(folder) if not name.startswith("."))
                advice = f"holds {held} and is not a cache; give a new folder, or an empty one"
                raise ConfigError("data.cache.dir", str(folder), advice)
            marker.write_text("Samples kept by data.cache. To free the space, remove this folder.\n")
        return CachedSet(folder, size, dataset)
    except OSError as error:
        _report(folder, error)
        return None


class CachedSet:
    """The entries of one data set; see `open_cached_set`."""

    def __init__(self, folder: Path, size: int, dataset: str) -> None:
        self._folder, self._size, self._in_use = folder, size, -1
        self._path = folder / digest_of(dataset).hex()
        self._path.mkdir(exist_ok=True)
        # Its lock waits for a process that is removing entries of it.
        self._in_use = os.open(self._path / DATASET, os.O_WRONLY | os.O_CREAT, 0o666)
        lock(self._in_use, fcntl.LOCK_SH)
        os.pwrite(self._in_use, f"{dataset}\n".encode("utf-8", "surrogateescape"), 0)
        self._touched, self._resumes = -_TOUCH_SECONDS, 0.0

    def __del__(self) -> None:
        if self._in_use >= 0:
            os.close(self._in_use)

    @property
    def keeps(self) -> bool:
        """True if new entries are written: not for a while after there was no room or an error."""
        return time.monotonic() >= self._resumes

    def path(self, digest: bytes) -> str:
        """Return the file of the entry whose key has `digest`."""
        name = digest.hex()
        return f"{self._path}/{name[:2]}/{name}"

    def load(self, digest: bytes) -> bytes | None:
        """Return the content of an entry; None if there is none. A damaged one is removed."""
        try:
            if time.monotonic() - self._touched > _TOUCH_SECONDS:
                self._touched = time.monotonic()
                os.utime(self._in_use)
            file = OpenFile(Path(self.path(digest)))
            magic, length, crc, key = _HEADER.unpack(file.read(0, _HEADER.size).ljust(_HEADER.size))
            if (magic, key, length) == (_MAGIC, digest, file.size - _HEADER.size):
                content = file.read(_HEADER.size, length)
                if crc32c.crc32c(content) == crc:
                    return content
        except FileNotFoundError:
            return None
        except (OSError, DataError) as error:
            _report(self._folder, error)
        self.drop(digest)
        return None

    def drop(self, digest: bytes) -> None:
        """Remove an entry, if there is one."""
        self._remove(self.path(digest))

    def claim(self, digest: bytes) -> Claim | None:
        """Return the right to write an entry; None if another thread or process has it."""
        path = self.path(digest)
        if self.keeps:
            try:
                descriptor = _open_locked(path + NEW)
                return None if descriptor is None else Claim(self, digest, descriptor)
            except OSError as error:
                self.pause(error)
        return Claim(self, digest, None)

    def reserve(self, descriptor: int, length: int) -> bool:
        """Make a file of `length` bytes of the one open as `descriptor`; return False if there is no room."""
        with open_usage(self._folder) as usage:
            if usage.make_room(blocks(length) - blocks(os.fstat(descriptor).st_size), self._size):
                usage.resize(descriptor, length)
                return True
        self._resumes = time.monotonic() + _PAUSE_SECONDS
        return False

    def rename(self, old: str, new: str) -> None:
        """Give a file of this data set another name."""
        # Not while another process counts the files.
        with open_usage(self._folder):
            os.rename(old, new)

    def release(self, digest: bytes) -> None:
        """Remove what was written of an entry that is not kept; the caller has claimed it."""
        self._remove(self.path(digest) + NEW)

    def pause(self, error: OSError) -> None:
        """Keep nothing for a while, because of `error`."""
        self._resumes = time.monotonic() + _PAUSE_SECONDS
        _report(self._folder, error)

    def _remove(self, path: str) -> None:
        try:
            with open_usage(self._folder) as usage:
                usage.remove(path)
        except OSError as error:
            _report(self._folder, error)


class Claim:
    """The right to write an entry, until the end of the `with` statement.

    Args:
        entries: Those of its data set.
        digest: Of its key.
        descriptor: The open and locked file that becomes the entry; None if it is not kept.
    """

    def __init__(self, entries: CachedSet, digest: bytes, descriptor: int | None) -> None:
        self._entries, self._digest, self._descriptor = entries, digest, descriptor

    def __enter__(self) -> Claim:
        return self

    def keep(self, content: bytes) -> None:
        """Write the entry, if there is room."""
        header = _HEADER.pack(_MAGIC, len(content), crc32c.crc32c(content), self._digest)
        descriptor, path = self._descriptor, self._entries.path(self._digest)
        try:
            if descriptor is None or not self._entries.reserve(descriptor, len(header) + len(content)):
                return
            at = os.pwrite(descriptor, header, 0)
            rest = memoryview(content)
            while rest:
                written = os.pwrite(descriptor, rest, at)
                at, rest = at + written, rest[written:]
            self._entries.rename(path + NEW, path)
        except OSError as error:
            self._entries.pause(error)
            return
        self._descriptor = None
        os.close(descriptor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            self._entries.release(self._digest)
            os.close(self._descriptor)


def _open_locked(path: str) -> int | None:
    """Return the file at `path`, created and locked; None if another thread or process has it."""
    flags = os.O_RDWR | os.O_CREAT
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path))
        descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The one who had it may have renamed or removed it meanwhile.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _report(folder: Path, error: Exception) -> None:
    """Warn of the first `error` in `folder`."""
    if folder not in _reported:
        _reported.add(folder)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        logger.warning("%s: the cache does not work (%s): what it lacks is fetched each time", folder, reason)
