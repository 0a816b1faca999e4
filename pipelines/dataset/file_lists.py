"""The list files beside samples, `files_data.lst` and `files_label.lst`: the names, in order.

The layout of NVIDIA's MLPerf HPC submissions: one name a line, and for gzip TFRecords the file's
length in bytes after it, which is what staging them wants to know.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import DataError
from pipelines.io import read_file, write_chunks

DATA_LIST, LABEL_LIST = "files_data.lst", "files_label.lst"


class ListedFile(NamedTuple):
    """A line of a list: a file's name, and its length in bytes where the list has it."""

    name: str
    bytes: int | None = None


def read_list(path: Path) -> tuple[ListedFile, ...]:
    """The lines of the list at `path`, without empty ones; DataError where one is not as above."""
    listed = []
    for line in read_file(path).decode(errors="replace").split("\n"):
        # A name may have blanks in it, and ends as those of samples do.
        name, _, length = line.rstrip().rpartition(" ")
        sized = bool(name) and length.isascii() and length.isdecimal()
        if line.strip():
            listed.append(ListedFile(name.rstrip(), int(length)) if sized else ListedFile(line.rstrip()))
    if len({entry.name for entry in listed}) != len(listed):
        raise DataError(path, "lists a file twice", "write the list anew")
    return tuple(listed)


def write_list(path: Path, listed: Iterable[ListedFile]) -> None:
    """Write the list at `path`, whole or not at all."""
    lines = (f"{name}\n" if length is None else f"{name} {length}\n" for name, length in listed)
    write_chunks(path, "".join(lines).encode())
