"""The list files beside samples, `files_data.lst` and `files_label.lst`: the names, in order.

The layout of NVIDIA's MLPerf HPC submissions: one name a line, followed for gzip TFRecords by the
file's length in bytes, which staging needs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import DataError
from pipelines.filesystem import is_hidden
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of

DATA_LIST, LABEL_LIST = "files_data.lst", "files_label.lst"

_SIZED = re.compile(r"(.*\S)\s+([0-9]+)")
"""A line that ends with a length."""


class ListedFile(NamedTuple):
    """A line of a list: a file's name, and its length in bytes if the list has it."""

    name: str
    bytes: int | None = None


def read_list(path: Location) -> tuple[ListedFile, ...]:
    """Return the files that the list at `path` names.

    Byte-order marks, line ends of other systems, empty lines and names that begin with a dot are skipped. A
    path in front of a name, absolute or seen from the list's folder or from the folder above, is left out if
    it leads to the file of that name in the list's folder.

    Raises:
        DataError: The list is not in UTF-8, or names a file twice.
    """
    content = storage_of(path).read(path)
    if b"\0" in content:
        raise DataError(path, "contains zero bytes, as text in UTF-16 does", "save the list in UTF-8")
    try:
        lines = content.decode().replace("\ufeff", "").splitlines()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(path, f"line {number} is not UTF-8", "save the list in UTF-8") from error
    in_own_folder = functools.cache(functools.partial(_is_same, path.parent, ""))
    files: dict[str, ListedFile] = {}
    for line in lines:
        # A name may contain blanks, and ends with a suffix of samples.
        name, length = line.rstrip(), None
        if sized := _SIZED.fullmatch(name):
            name, length = sized[1], int(sized[2])
        if name[:1].isspace() and not storage_of(path).is_present(path.parent / name):
            name = name.lstrip()
        folder, last = os.path.split(name)
        if folder and (in_own_folder(folder) or _is_same(path.parent, last, name)):
            name = last
        if not last or is_hidden(last):
            continue
        if name in files:
            raise DataError(path, f"lists {name} twice", "regenerate the list")
        files[name] = ListedFile(name, length)
    return tuple(files.values())


def _is_same(folder: Location, name: str, listed: str) -> bool:
    """Return True if `listed`, seen from `folder` or from the folder above, is `name` in `folder`."""
    if not isinstance(folder, Path):
        return False
    for base in (folder, folder.absolute().parent):
        with contextlib.suppress(OSError):
            if os.path.samefile(base / listed, folder / name):
                return True
    return False


def write_list(path: Location, files: Iterable[ListedFile]) -> None:
    """Write the list at `path` atomically."""
    lines = (f"{name}\n" if length is None else f"{name} {length}\n" for name, length in files)
    storage_of(path).write(path, "".join(lines).encode())
