"""Names and kinds of files, walks through folders, and operations that some file systems lack.

FUSE, CIFS, 9p and parallel file systems refuse operations that local ones have, such as syncing a folder or
mapping a file. None of these refusals harms the content of a file.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import resource
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pipelines.errors import AccessError, ConfigError, DataError, reading

UNSUPPORTED = frozenset(
    {
        errno.EINVAL,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.ENOTTY,
        errno.ENODEV,
        errno.ENOLCK,
        524,  # ENOTSUPP, which Linux's NFS client passes on by mistake.
    }
)
"""Numbers of the errors by which a file system refuses an operation that it does not have."""

_FOLDER_CANNOT_SYNC = UNSUPPORTED | {errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}
"""The same for syncing a folder; the last two occur for a folder that can be written but not read."""

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
"""The syntax of os.path.expandvars."""

_reported: set[str] = set()
"""Operations that `report_unsupported` has reported in this process."""

logger = logging.getLogger(__name__)


def report_unsupported(path: str | os.PathLike[str], operation: str, error: OSError, instead: str) -> None:
    """Log a warning that `operation` was refused at `path`, and what is done `instead`; once per process."""
    if operation not in _reported:
        _reported.add(operation)
        reason = error.strerror or error
        logger.warning("%s: its file system does not support %s (%s): %s", path, operation, reason, instead)


def sync_file(descriptor: int, path: Path) -> None:
    """Sync the file `path`, open as `descriptor`, to the disk where its file system supports that.

    Raises:
        AccessError: Syncing is supported and failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise AccessError.writing(path, error, "cannot be synced to the disk") from error
        report_unsupported(path, "syncing a file", error, "it is complete once the system has written it")


def sync_folder(folder: Path) -> None:
    """Sync the names in `folder` to the disk where its file system supports that; see `sync_file`."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_CANNOT_SYNC:
            raise AccessError.writing(folder, error, "cannot be synced to the disk") from error
        report_unsupported(folder, "syncing a folder", error, "a power failure may undo the last files")


def free_space(folder: Path) -> tuple[int, int] | None:
    """Return the free bytes in `folder` for this user, and the bytes of a block; None if not known."""
    try:
        state = os.statvfs(folder)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise AccessError.reading(folder, error) from error
        return None
    # FUSE file systems without this operation report zero blocks.
    return (state.f_bavail * state.f_frsize, state.f_frsize) if state.f_blocks and state.f_frsize else None


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> int:
    """Open the file at `path` for reading; return its descriptor.

    Args:
        flags: Further flags of open(2).

    Raises:
        DataError: It is a folder, FIFO, socket or device.
        OSError: It cannot be opened.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer. Regular files are read as without it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    kind = kind_of(os.fstat(descriptor))
    if kind == "file":
        return descriptor
    os.close(descriptor)
    raise DataError(path, f"is a {kind}, not a file", "give a file, or remove it from its folder")


def read_text(path: str | os.PathLike[str], errors: str = "strict") -> str:
    """Return the text of the file at `path`, or of a pipe that this process has inherited.

    Args:
        errors: As in `open`.

    Raises:
        DataError: It is a folder, FIFO, socket or device.
        OSError: It cannot be read.
    """
    # /dev/stdin, and the /dev/fd/63 of a shell's `<(...)`, which have a writer, lead to /proc.
    inherited = os.path.realpath(path).startswith("/proc/")
    with open(path if inherited else open_regular(path), encoding="utf-8", errors=errors) as file:
        return file.read()


def kind_of(state: os.stat_result) -> str:
    """Return "file", "folder", "FIFO", "socket" or "device"."""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(state.st_mode), "device")


def refuse_input(output: Path, inputs: Iterable[os.PathLike[str]]) -> None:
    """Raise DataError if `output` is one of `inputs`, also by a symbolic or hard link."""
    # A file that cannot be accessed is reported where it is read or written.
    with contextlib.suppress(OSError):
        found = os.stat(output)
        for path in inputs:
            with contextlib.suppress(OSError):
                if os.path.samestat(found, os.stat(path)):
                    raise DataError(output, f"is the input {os.fspath(path)} itself", "choose another output")


def raise_open_file_limit(count: int) -> int:
    """Raise the limit of open files to `count`, or as far as the system allows; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        count = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    return count


def provide_scratch(folder: Path) -> None:
    """Have libraries keep temporary files and compiled kernels in `folder` if they have no other place.

    If neither TMPDIR, /tmp, /var/tmp nor the working folder can be written, torch's optimizers and matplotlib
    cannot be imported. Triton keeps its kernels in the home folder.
    """
    folder = folder.absolute()
    if not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        # For this process, and those that it starts.
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)


def node_folder(text: str, key: str) -> Path:
    """Return the folder `text` of the setting `key`, with the values of environment variables on this node.

    Raises:
        ConfigError: A variable is not set here, or it is a URL.
    """
    folder = os.path.expandvars(text)
    if "://" in folder:
        raise ConfigError(key, text, "expected a folder on each node's own disk, not a URL")
    if "$" in folder:
        unset = _VARIABLE.search(folder)
        fault = (
            f"{unset[0]} is not set on {os.uname().nodename}; set it"
            if unset
            else "$ without the name of a variable; add it"
        )
        raise ConfigError(key, text, f"{fault}, or write the folder without a variable")
    return Path(folder)


def is_hidden(path: str) -> bool:
    """Return True if a part of the relative `path` begins with a dot.

    Such a file is no sample, universe or log, whatever its suffix: macOS keeps attributes in `._NAME`, NFS
    keeps files that were removed while open as `.nfs...`, and snapshots, trash and copies of editors are in
    folders of such names.
    """
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def is_empty(folder: Path) -> bool:
    """Return True if `folder` holds no files or folders but hidden ones, such as locks and .DS_Store."""
    return all(map(is_hidden, os.listdir(folder)))


def is_present(path: Path) -> bool:
    """Return True if `path` exists, or is a symbolic link that leads nowhere.

    Raises:
        AccessError: The folder cannot be searched.
    """
    with reading(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)
        return True
    return False


def find_files(root: Path, suffixes: tuple[str, ...]) -> tuple[list[Path], list[DataError]]:
    """Find the files in `root` and below whose names end with one of `suffixes`, and are not hidden.

    Symbolic links are followed. A file or folder that is reached several times, such as one that links form
    a loop to, is taken once, by a path without links if there is one; a warning names the other paths.

    Returns:
        The files, sorted, among them those that cannot be read; and an error for everything else that cannot
        be followed: folders that cannot be listed, links that lead nowhere, pipes and devices.
    """
    files: list[Path] = []
    errors: list[DataError] = []
    first: dict[tuple[int, int], Path] = {}
    pending, links = [root], list[Path]()
    while pending or links:
        path = pending.pop() if pending else links.pop(0)
        wanted = path.name.endswith(suffixes)
        try:
            found = os.stat(path)
            if not stat.S_ISDIR(found.st_mode) and not wanted:
                continue
            same = first.setdefault((found.st_dev, found.st_ino), path)
            if same is not path:
                logger.warning("%s: is %s, which is read once", path, same)
            elif stat.S_ISDIR(found.st_mode):
                with os.scandir(path) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        if is_hidden(entry.name):
                            continue
                        if entry.is_symlink():
                            links.append(path / entry.name)
                        elif entry.is_dir() or entry.name.endswith(suffixes):
                            pending.append(path / entry.name)
            elif stat.S_ISREG(found.st_mode):
                files.append(path)
            else:
                errors.append(DataError(path, "is neither a file nor a folder", "remove it"))
        except OSError as error:
            if wanted and path != root:
                files.append(path)
            else:
                errors.append(AccessError.reading(path, error))
    return sorted(files), sorted(errors, key=str)
