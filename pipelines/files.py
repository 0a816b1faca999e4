"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import DataError

TEMPORARY = ".tmp"
"""The suffix of a file that is being written; one that is left over is safe to remove."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a temporary file beside `path`, and give it that name once it is on disk.

    The temporary name holds the process id, so that several writers of one path do not meet; the
    last one to finish wins. DataError where the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise
    # The rename lives in the directory, which has its own place on the disk.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """The content of the file at `path`; DataError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            path, f"cannot be read ({error.strerror})", "check the path and its rights"
        ) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """What to tell a user whose file at `path` met `error` while it was written."""
    return DataError(path, f"cannot be written ({error.strerror})", "check the free space and the rights")
