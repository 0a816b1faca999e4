"""Exclusive use of a folder by one process, also among nodes.

The file `.lock` of the folder is locked in two ways, because neither is enough everywhere:

- With flock. The kernel releases it when the last process that has the file open ends, however it ends. NFS
  and Lustre keep it for all nodes, unless they are mounted with `local_lock`, `localflock` or `noflock`; some
  file systems refuse it.
- With a record of the holder in the file. A holder on this system has ended if its process has. Any holder
  changes the file every `RENEWAL_INTERVAL`; one on another system has ended if the file does not change for
  `STALE_TIMEOUT`, measured by the process that waits, so that no clocks are compared.

Where flock does not decide, two processes may replace the record of an ended holder at the same moment: the
later record counts. A holder reads its record again `_SETTLING` after writing it, and at each renewal, and
ends if it was replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.errors import AccessError, writing
from pipelines.filesystem import UNSUPPORTED, report_unsupported

LOCK_FILE = ".lock"
"""The file that a writer of a folder locks: NFS and Lustre keep locks of the folder itself on one node.

It is never removed, as another process may be waiting for its lock."""

RENEWAL_INTERVAL = 10.0
"""Seconds between two changes of a lock file by its holder."""

STALE_TIMEOUT = 60.0
"""Seconds without a change after which a holder on another system counts as ended."""

_SETTLING = 2.0
"""Seconds within which two processes that found the same ended holder have written their records."""

_RECORD_BYTES = 512
"""Length of a record, filled with spaces: a write of so few bytes is not mixed with another."""

_MAX_PAUSE = 0.5
"""Seconds between two attempts to get a lock, at most."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Holder:
    """Record of the process that holds a lock.

    Args:
        host: Its host's name.
        system: Boot and process namespace, within which process IDs mean something.
        pid: Its process ID.
        started: Time of its start, in clock ticks since the boot.
        since: Date of the lock.
        inode: Number of the lock file; a copy of the file has another.
        token: Random; different for two locks of one process.
    """

    host: str
    system: str
    pid: int
    started: int
    since: str
    inode: int
    token: str

    @staticmethod
    def this_process(descriptor: int) -> _Holder:
        """Return the record of this process for the lock file open as `descriptor`."""
        pid, since, inode = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), os.fstat(descriptor).st_ino
        token = secrets.token_hex(8)
        return _Holder(socket.gethostname(), _system(), pid, _start(pid) or 0, since, inode, token)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def is_running(self) -> bool | None:
        """Return whether the process runs; None if it is one of another system."""
        return _start(self.pid) == self.started if self.system == _system() else None


def _parse(content: bytes) -> _Holder | None:
    with contextlib.suppress(ValueError, TypeError):
        return _Holder(**json.loads(content))
    return None


def _system() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start(pid: int) -> int | None:
    """Return the time of the start of process `pid`, in clock ticks since the boot; None if it has ended."""
    try:
        # The name of the program, in parentheses, may contain anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@contextlib.contextmanager
def locked(folder: Path, wait: Callable[[str], object], *, grace: float = 0.0) -> Iterator[int]:
    """Hold an exclusive lock on `folder`; yield its descriptor.

    A child process that inherits the descriptor keeps the lock if this process is killed.

    Args:
        folder: An existing folder.
        wait: Called with a description of the holder before waiting for it; may raise instead.
        grace: Seconds for a holder that was killed to end, before `wait` is called.

    Raises:
        AccessError: The lock file cannot be opened or locked.
    """
    with open(_open(folder / LOCK_FILE), "rb") as file:
        lock = _Lock(folder / LOCK_FILE, file.fileno())
        lock.acquire(wait, grace)
        ended = threading.Event()
        renewals = threading.Thread(target=lock.renew, args=(ended,), daemon=True)
        renewals.start()
        try:
            yield file.fileno()
        finally:
            ended.set()
            renewals.join()
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), 0)


class _Lock:
    """The lock file at `path`, open as `descriptor`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._record = json.dumps(asdict(_Holder.this_process(descriptor))).ljust(_RECORD_BYTES).encode()
        self._state: tuple[bytes, int] | None = None
        self._unchanged_since, self._changes, self._is_recorded = 0.0, -1, False

    def acquire(self, wait: Callable[[str], object], grace: float) -> None:
        """Wait until no other process holds the lock, and write this process's record; see `locked`."""
        start, pause, announced, waits = time.monotonic(), 0.005, False, False
        while True:
            flocked = self._flock()
            holder, running = self._look(flocked)
            if running is False and flocked is not False:
                if self._write_record(settles=flocked is None):
                    return
                continue
            if flocked:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            if flocked is not False and running is None and self._changes == 0:
                if not announced:
                    announced = True
                    text = "%s: was locked by %s; waiting up to %.0f s for a sign that it is running"
                    logger.warning(text, self._path.parent, holder, STALE_TIMEOUT)
            elif not waits and time.monotonic() - start >= grace:
                waits = True
                wait(holder)
            time.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE)

    def _flock(self) -> bool | None:
        """Try to lock the file; return whether it is locked, or None if the file system has no such locks."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno == errno.EBADF:
                fault = "belongs to another user, and cannot be locked"
                raise AccessError(self._path, fault, "remove it while no program writes there") from error
            if error.errno not in UNSUPPORTED | {errno.EIO}:
                raise AccessError.writing(self._path, error) from error
            instead = f"a lock of another node that is not renewed for {STALE_TIMEOUT:.0f} s has ended"
            report_unsupported(self._path, "locks", error, instead)
            return None

    def _look(self, flocked: bool | None) -> tuple[str, bool | None]:
        """Return a description of the process in the file, and whether it runs; None if that is not known."""
        content, now = os.pread(self._descriptor, _RECORD_BYTES, 0), time.monotonic()
        file = os.fstat(self._descriptor)
        state = content, file.st_mtime_ns
        if state != self._state:
            self._state, self._unchanged_since, self._changes = state, now, self._changes + 1
        if not content:
            return "another process", False
        holder = _parse(content)
        running = holder.is_running() if holder else None
        if flocked and running and holder and holder.inode != file.st_ino:
            running = False  # It holds the folder that this one is a copy of.
        if running is None and now - self._unchanged_since >= STALE_TIMEOUT:
            running = False
        return str(holder or "another process"), running

    def _write_record(self, *, settles: bool) -> bool:
        """Write this process's record; return False if another process has replaced it while it `settles`."""
        try:
            os.pwrite(self._descriptor, self._record, 0)
        except OSError as error:
            if error.errno == errno.EBADF:
                return True  # Another user's file, open for reading only: the lock is flock alone.
            raise AccessError.writing(self._path, error) from error
        self._is_recorded = True
        if settles:
            time.sleep(_SETTLING)
        return not settles or os.pread(self._descriptor, _RECORD_BYTES, 0) == self._record

    def renew(self, ended: threading.Event) -> None:
        """Change the file from time to time until the event `ended`; end the process if the lock is lost."""
        pause = _SETTLING
        while self._is_recorded and not ended.wait(pause):
            pause = RENEWAL_INTERVAL
            # A failed renewal counts as a missing one.
            with contextlib.suppress(OSError):
                # By name, as someone may have removed the file.
                content = self._path.read_bytes()
                if content != self._record and (other := _parse(content)):
                    print(
                        f"error: {self._path.parent}: was taken over by {other}", file=sys.stderr, flush=True
                    )
                    os._exit(1)
                os.utime(self._descriptor)


def _open(path: Path) -> int:
    """Open the lock file at `path`, creating it if needed."""
    with writing(path):
        try:
            # Open for writing, which NFS requires, and with the folder's own permissions.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            with contextlib.suppress(OSError):
                return os.open(path, os.O_RDONLY)
            raise
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, os.stat(path.parent).st_mode & 0o666)
        return descriptor
