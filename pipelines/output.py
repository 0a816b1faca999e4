"""Files that a user names for the results of a program."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import DataError, writing
from pipelines.filesystem import kind_of
from pipelines.io import write_atomically

_STDOUT = 1
"""Descriptor of standard output, which /dev/stdout names."""


def write_output(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write the file `path` atomically, or a FIFO or device piece by piece.

    A symbolic link stays, and the file that it leads to is replaced.

    Args:
        write: fills the open file; an exception from it leaves an earlier file as it was.

    Raises:
        DataError: it is a folder, or a FIFO without a reader.
        AccessError: it cannot be written.
    """
    try:
        state = os.stat(path)
    except OSError:  # Writing it then gives the reason, if it is not just new.
        write_atomically(path.resolve(), write)
        return
    kind = kind_of(state)
    if kind == "folder":
        raise DataError(path, "is a folder, not a file", "name a file in it")
    with writing(path):
        if os.path.samestat(state, os.fstat(_STDOUT)):
            # Replacing the file that it is redirected to would lose what else is written there.
            sys.stdout.flush()
            with open(os.dup(_STDOUT), "wb") as file:
                write(file)
        elif kind == "file":
            write_atomically(path.resolve(), write)
        else:
            with open(_open_stream(path), "wb") as file:
                write(file)


def _open_stream(path: Path) -> int:
    """Open a FIFO or device for writing; DataError if the FIFO has no reader."""
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a reader.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise DataError(path, "has no reader", "start one, or name a file") from error
        raise
    os.set_blocking(descriptor, True)
    return descriptor
