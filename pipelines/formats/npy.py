"""One sample as two .npy files, `<stem>_data.npy` and `<stem>_label.npy`.

The layout of NVIDIA's MLPerf HPC submissions: counts as C-order little-endian int16 (size, size,
size, 4) and the target as float32 (4,), beside `files_data.lst` and `files_label.lst`, which list
the names, one a line.
"""

from __future__ import annotations

import functools
import io
import mmap
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.errors import AccessError, DataError
from pipelines.files import Written, write_chunks
from pipelines.formats.base import Payload
from pipelines.sample import Sample, SampleSpec, check_counts, check_target

DATA, LABEL = "_data.npy", "_label.npy"
_REMEDY = "convert the sample again"


class Npy:
    """The format; see the module."""

    name = "npy"
    suffix = DATA
    parts = (LABEL, DATA)
    extras = ()

    def write(self, directory: Path, stem: str, sample: Sample) -> tuple[Written, ...]:
        """Write the label, then the data, each whole or not at all."""
        arrays = ((LABEL, sample.target), (DATA, sample.counts))
        return tuple(write_npy(directory / f"{stem}{part}", array) for part, array in arrays)

    def read(self, path: Path, spec: SampleSpec | None = None) -> Sample:
        """The sample whose counts are in `path`, and its target in the file beside it."""
        return Sample(check_counts(path, read_npy(path), spec), _read_target(path))

    def payload(self, path: Path, spec: SampleSpec) -> Payload:
        """The sample, its counts where the kernel keeps the file: mapped, not copied.

        DALI's threads take the pages as they come to them, and the kernel has been told to fetch
        them. Counts below zero are left to the graph's table to find.
        """
        with _open(path) as file:
            header, start = _read_header(path, file), file.tell()
            if header.shape != spec.shape or header.dtype != np.int16:
                # Reading it whole says in full what is wrong.
                self.read(path, spec)
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_WILLNEED)
        counts = np.frombuffer(mapped, np.int16, offset=start).reshape(header.shape)
        return Payload(counts, _read_target(path))


def write_npy(path: Path, array: npt.NDArray[Any]) -> Written:
    """Write `array` as numpy.save does, whole or not at all."""
    array, header = np.ascontiguousarray(array), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return write_chunks(path, header.getvalue(), array.data.cast("B"))


def read_npy(path: Path) -> npt.NDArray[Any]:
    """The array in the .npy file at `path`; DataError names any fault."""
    with _open(path) as file:
        header = _read_header(path, file)
        return np.fromfile(file, header.dtype).reshape(header.shape)


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _read_target(path: Path) -> npt.NDArray[np.float32]:
    """The target beside the counts in `path`."""
    label = path.with_name(path.name.removesuffix(DATA) + LABEL)
    return check_target(label, read_npy(label))


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise AccessError.reading(path, error) from error


def _read_header(path: Path, file: BinaryIO) -> _Header:
    """The header of `file`, which is left behind it; the file is as long as the header says."""
    content = file.read(10)
    # Version 1 has two bytes for the length of what follows, which every writer of small headers uses.
    content += file.read(int.from_bytes(content[8:], "little"))
    try:
        with _PARSING:
            shape, fortran, dtype = _parse_header(content)
    except Exception as error:  # the header is a Python expression, and its parser has many errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(path, f"is no .npy file ({reason})", _REMEDY) from error
    if dtype.hasobject or dtype.byteorder == ">":
        raise DataError(path, f"holds {dtype.str}", "expected little-endian int16 counts or a float32 target")
    if fortran and len(shape) > 1:
        raise DataError(path, "is in Fortran order", "save it in C order")
    expected = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    length = os.fstat(file.fileno()).st_size - file.tell()
    if length != expected:
        raise DataError(path, f"holds {length} bytes where its header says {expected}", _REMEDY)
    return _Header(shape, dtype)


_PARSING = threading.Lock()
"""Python's own parser, which numpy uses on headers, is not safe in two threads at once."""


@functools.lru_cache(maxsize=8)
def _parse_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, Fortran order, dtype) of a header; a data set has but one or two different ones."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"npy version {version[0]}.{version[1]}")
    return np.lib.format.read_array_header_1_0(file)
