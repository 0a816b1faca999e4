"""A disk of limited speed: the kernel's limit of a control group on reads of the real disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.errors import UserError

_GROUPS = Path("/sys/fs/cgroup")
_NAME = "peers_bench"


@contextlib.contextmanager
def limited_disk(folder: Path, bytes_per_s: int) -> Iterator[Callable[[], None]]:
    """Limit reads from the disk of `folder`; yield a function that puts the calling process under the limit.

    It needs root, and control groups of version 2 (io.max) or 1 (blkio.throttle).

    Raises:
        UserError: `folder` is on no disk, or the limit cannot be set.
    """
    device = _disk(folder)
    if (_GROUPS / "cgroup.controllers").exists():
        group, limit = _GROUPS / _NAME, ("io.max", f"{device} rbps={bytes_per_s}")
    else:
        group = _GROUPS / "blkio" / _NAME
        limit = ("blkio.throttle.read_bps_device", f"{device} {bytes_per_s}")
    name, value = limit
    try:
        if name == "io.max":
            (_GROUPS / "cgroup.subtree_control").write_text("+io")
        group.mkdir(exist_ok=True)
        (group / name).write_text(value)
    except OSError as error:
        raise UserError(
            f"{group / name}: cannot limit disk {device} ({error.strerror}): "
            "run as root and not in a container"
        ) from error

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        # Fails while a process in it has not ended; the next run uses it again.
        with contextlib.suppress(OSError):
            group.rmdir()


def drop_from_cache(file: Path) -> None:
    """Write `file` to its disk and remove it from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _disk(folder: Path) -> str:
    """Return the number MAJOR:MINOR of the disk of `folder`, not of its partition."""
    device = os.stat(folder).st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not path.exists():
        raise UserError(f"{folder}: on no disk of its own: name a folder on one with --data-dir")
    path = path.resolve()
    if (path / "partition").exists():
        path = path.parent
    return (path / "dev").read_text().strip()
