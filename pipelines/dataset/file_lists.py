"""The list files beside samples, `files_data.lst` and `files_label.lst`: the names, in order.

The layout of NVIDIA's MLPerf HPC submissions: one name a line, followed for gzip TFRecords by the
file's length in bytes, which staging needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import DataError
from pipelines.io import read_file, write_file

DATA_LIST, LABEL_LIST = "files_data.lst", "files_label.lst"


class ListedFile(NamedTuple):
    """A line of a list: a file's name, and its length in bytes if the list has it."""

    name: str
    bytes: int | None = None


def read_list(path: Path) -> tuple[ListedFile, ...]:
    """Return the lines of the list at `path` that are not empty; DataError if it names a file twice."""
    files = []
    for line in read_file(path).decode(errors="replace").split("\n"):
        # A name may contain blanks, and ends with a suffix of samples.
        name, _, length = line.rstrip().rpartition(" ")
        sized = bool(name) and length.isascii() and length.isdecimal()
        if line.strip():
            files.append(ListedFile(name.rstrip(), int(length)) if sized else ListedFile(line.rstrip()))
    if len({file.name for file in files}) != len(files):
        raise DataError(path, "lists a file twice", "regenerate the list")
    return tuple(files)


def write_list(path: Path, files: Iterable[ListedFile]) -> None:
    """Write the list at `path` atomically."""
    lines = (f"{name}\n" if length is None else f"{name} {length}\n" for name, length in files)
    write_file(path, "".join(lines).encode())
