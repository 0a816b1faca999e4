"""Folders of files that others made: which names count, and what symbolic links lead to."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path

from pipelines.errors import AccessError, DataError, reading

logger = logging.getLogger(__name__)


def is_hidden(path: str) -> bool:
    """Return True if a part of the relative `path` begins with a dot.

    Such a file is no sample, universe or log, whatever its suffix: macOS keeps attributes in `._NAME`, NFS
    keeps files that were removed while open as `.nfs...`, and snapshots, trash and copies of editors are in
    folders of such names.
    """
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def is_present(path: Path) -> bool:
    """Return True if `path` exists, or is a symbolic link that leads nowhere.

    Raises:
        AccessError: The folder does not allow to see that.
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
