"""One sample as two .npy files, `<sample_id>_data.npy` and `<sample_id>_label.npy`.

The layout of NVIDIA's MLPerf HPC submissions: counts as C-order little-endian int16 (size, size,
size, 4) and the target as float32 (4,), beside `files_data.lst` and `files_label.lst`, which list
the names, one a line.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.errors import AccessError, DataError
from pipelines.formats.base import CountsPayload
from pipelines.io import WrittenFile, read_file, write_chunks
from pipelines.sample import Sample, SampleSpec, check_counts, check_target

DATA_SUFFIX, LABEL_SUFFIX = "_data.npy", "_label.npy"
_REMEDY = "convert the sample again"


class Npy:
    """The format; see the module."""

    name = "npy"
    suffix = DATA_SUFFIX
    suffixes = (LABEL_SUFFIX, DATA_SUFFIX)
    extra_suffixes = ()

    def write(self, directory: Path, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write the label, then the data, each whole or not at all."""
        arrays = ((LABEL_SUFFIX, sample.target), (DATA_SUFFIX, sample.counts))
        return tuple(write_npy(directory / f"{sample_id}{part}", array) for part, array in arrays)

    def parse(self, path: Path, files: Mapping[str, bytes], spec: SampleSpec | None = None) -> Sample:
        """The sample, its arrays views of `files`."""
        label = _label(path)
        counts = check_counts(path, parse_npy(path, files[DATA_SUFFIX]), spec)
        return Sample(counts, check_target(label, parse_npy(label, files[LABEL_SUFFIX])))

    def read(self, path: Path, spec: SampleSpec | None = None) -> Sample:
        """The sample whose counts are in `path`, and its target in the file beside it."""
        return self.parse(path, {DATA_SUFFIX: read_file(path), LABEL_SUFFIX: read_file(_label(path))}, spec)

    def payload(self, path: Path, spec: SampleSpec, *, fully_validate: bool = False) -> CountsPayload:
        """The sample, its counts where the kernel keeps the file: mapped, not copied.

        DALI's threads take the pages as they come to them. Counts below zero are left to the graph's
        table to find, but with `fully_validate`.
        """
        if fully_validate:
            sample = self.read(path, spec)
            return CountsPayload(sample.counts, sample.target)
        try:
            with open(path, "rb") as file:
                # An empty file cannot be mapped, and has no header that says what it should have been.
                size = os.fstat(file.fileno()).st_size
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else b""
        except OSError as error:
            raise AccessError.reading(path, error) from error
        header = _read_header(path, mapped)
        if header.shape != spec.shape or header.dtype != np.int16:
            # Reading it whole says in full what is wrong.
            self.read(path, spec)
        counts = np.frombuffer(mapped, np.int16, offset=header.length).reshape(header.shape)
        label = _label(path)
        target = check_target(label, parse_npy(label, read_file(label)))
        return CountsPayload(counts, target, mapped if isinstance(mapped, mmap.mmap) else None)


def write_npy(path: Path, array: npt.NDArray[Any]) -> WrittenFile:
    """Write `array` as numpy.save does, whole or not at all."""
    array, header = np.ascontiguousarray(array), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return write_chunks(path, header.getvalue(), array.data.cast("B"))


def parse_npy(path: Path, content: bytes) -> npt.NDArray[Any]:
    """The array in `content`, that of the .npy file at `path`, as a view; DataError names any fault."""
    header = _read_header(path, content)
    return np.frombuffer(content, header.dtype, offset=header.length).reshape(header.shape)


class _Header(NamedTuple):
    """What the header says, and its own length in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    length: int


def _label(path: Path) -> Path:
    """The file of the target beside the counts in `path`."""
    return path.with_name(path.name.removesuffix(DATA_SUFFIX) + LABEL_SUFFIX)


def _read_header(path: Path, content: bytes | mmap.mmap) -> _Header:
    """The header of `content`, which is as long as it says."""
    # Version 1 has two bytes for the length of what follows, which every writer of small headers uses.
    length = 10 + int.from_bytes(content[8:10], "little")
    try:
        with _PARSING:
            shape, fortran, dtype = _parse_header(content[:length])
    except Exception as error:  # the header is a Python expression, and its parser has many errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(path, f"is no .npy file ({reason})", _REMEDY) from error
    if dtype.kind not in "iuf" or dtype.byteorder == ">":
        raise DataError(path, f"holds {dtype.str}", "expected little-endian int16 counts or a float32 target")
    if fortran and len(shape) > 1:
        raise DataError(path, "is in Fortran order", "save it in C order")
    if min(shape, default=1) < 1:
        raise DataError(path, f"has the shape {shape}", _REMEDY)
    expected = dtype.itemsize * math.prod(shape)
    if len(content) - length != expected:
        fault = f"holds {len(content) - length} bytes where its header says {expected}"
        raise DataError(path, fault, _REMEDY)
    return _Header(shape, dtype, length)


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
