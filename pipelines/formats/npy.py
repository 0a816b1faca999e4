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
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError, reading
from pipelines.formats.base import Format
from pipelines.formats.payload import CountsPayload
from pipelines.formats.signatures import SIGNATURE_BYTES, recognize
from pipelines.io import OpenFile, WrittenFile, map_file, read_direct, read_file, retry_stale
from pipelines.sample import (
    UNKNOWN_TARGET,
    Sample,
    SampleSpec,
    check_counts,
    check_not_negative,
    check_target,
)
from pipelines.slab import Slab, cyclic_runs
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of

DATA_SUFFIX, LABEL_SUFFIX = "_data.npy", "_label.npy"
_REMEDY = "convert the sample again"

_USUAL_START = 128
"""Bytes before the array in a file that numpy has written."""


class Npy(Format):
    """The format; see the module."""

    name = "npy"
    suffix = DATA_SUFFIX
    suffixes = keys = (LABEL_SUFFIX, DATA_SUFFIX)

    def write(self, directory: Location, sample_id: str, sample: Sample) -> tuple[WrittenFile, ...]:
        """Write the label, then the data, each atomically."""
        arrays = ((LABEL_SUFFIX, sample.target), (DATA_SUFFIX, sample.counts))
        return tuple(write_npy(directory / f"{sample_id}{suffix}", array) for suffix, array in arrays)

    def parse(
        self,
        path: Location,
        contents: Mapping[str, bytes],
        spec: SampleSpec | None = None,
        *,
        labeled: bool = True,
    ) -> Sample:
        """See `Format.parse`."""
        counts = check_counts(path, parse_npy(path, contents[DATA_SUFFIX]), spec)
        if not labeled:
            return Sample(counts, UNKNOWN_TARGET)
        label = _label_path(path)
        return Sample(counts, check_target(label, parse_npy(label, contents[LABEL_SUFFIX])))


def map_sample(path: Path, spec: SampleSpec) -> CountsPayload:
    """Memory-map the counts in `path` and read the target beside them.

    Nothing is copied: DALI's threads read the pages as they need them. Negative counts are not
    noticed here; the DALI graph maps them to NaN.

    Raises:
        DataError: a header or the target is damaged, or the shape is not that of `spec`.
    """
    mapped = map_file(path)
    counts = parse_npy(path, mapped)
    if counts.shape != spec.shape or counts.dtype != np.int16:
        check_counts(path, counts, spec)
    return CountsPayload(counts, _read_target(path), mapped if isinstance(mapped, mmap.mmap) else None)


def read_slab(path: Path, spec: SampleSpec, slab: Slab, *, direct: bool = False) -> CountsPayload:
    """Read the planes of `slab` of the counts in `path`, and the target beside them.

    Args:
        direct: bypass the page cache, where the file system supports it.

    Raises:
        DataError: a header, the target or a count of these planes is damaged, or the shape is not that of
            `spec`.
    """

    def read() -> npt.NDArray[np.int16]:
        file = OpenFile(path)

        def read_part(offset: int, length: int) -> bytes:
            content = read_direct(path, offset, length) if direct else None
            return file.read(offset, length) if content is None else content

        start = read_part(0, _USUAL_START)
        if (missing := _start_length(start) - len(start)) > 0:
            start += read_part(len(start), missing)
        shape, dtype, length = _parse_start(path, start, file.size)
        # Of what the header says alone.
        check_counts(path, np.broadcast_to(dtype.type(0), shape), spec)
        counts = np.zeros(slab.shape(spec), np.int16)
        planes, first = slab.planes(spec.size)
        at, plane_bytes = planes.start, counts[0].nbytes
        for run in cyclic_runs(first, len(counts[planes]), spec.size):
            content = read_part(length + run.start * plane_bytes, len(run) * plane_bytes)
            if len(content) < len(run) * plane_bytes:
                raise DataError(path, "was cut off while it was read", _REMEDY)
            counts[at : at + len(run)] = np.frombuffer(content, dtype).reshape(-1, *spec.shape[1:])
            at += len(run)
        return counts

    with reading(path):
        counts = retry_stale(read)
    check_not_negative(path, counts)
    return CountsPayload(counts, _read_target(path))


def cut_slab(counts: npt.NDArray[np.int16], slab: Slab) -> npt.NDArray[np.int16]:
    """Return the planes of `slab` of `counts`, as `read_slab` reads them."""
    size = len(counts)
    planes, first = slab.planes(size)
    found = np.zeros(slab.shape(SampleSpec(size, counts.shape[-1])), np.int16)
    count = len(found[planes])
    found[planes] = counts.take(range(first, first + count), axis=0, mode="wrap")
    return found


def write_npy(path: Location, array: npt.NDArray[Any]) -> WrittenFile:
    """Write `array` as numpy.save does, atomically."""
    array, header = np.ascontiguousarray(array), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return storage_of(path).write(path, header.getvalue(), array.data.cast("B"))


def parse_npy(path: Location, content: bytes | mmap.mmap) -> npt.NDArray[Any]:
    """Return the array in `content`, of the .npy file `path`, as a view.

    Raises:
        DataError: the content is not one complete numeric array of npy version 1.0 in C order.
    """
    start = content[: max(_start_length(content), SIGNATURE_BYTES)]
    shape, dtype, length = _parse_start(path, start, len(content))
    return np.frombuffer(content, dtype, offset=length).reshape(shape)


def _start_length(content: bytes | mmap.mmap) -> int:
    """Return the number of bytes before the array."""
    # Version 1.0, which every writer uses for small headers, has two bytes for the header's length.
    return 10 + int.from_bytes(content[8:10], "little")


def _parse_start(path: Location, start: bytes, size: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and offset of the array in the .npy file `path` of `size` bytes, by its `start`.

    Raises:
        DataError: see `parse_npy`.
    """
    length = _start_length(start)
    if start[:6] != np.lib.format.MAGIC_PREFIX and (kind := recognize(start[:SIGNATURE_BYTES])):
        raise DataError(path, f"holds {kind} instead of an array", "replace it by the .npy file itself")
    try:
        with _PARSER_LOCK:
            shape, fortran, dtype = _parse_header(start[:length])
    except Exception as error:  # the header is a Python expression, and its parser raises many errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(path, f"is not a valid .npy file ({reason})", _REMEDY) from error
    if dtype.kind not in "iuf" or dtype.byteorder == ">":
        raise DataError(path, f"holds {dtype.str}", "expected little-endian int16 counts or a float32 target")
    if fortran and len(shape) > 1:
        raise DataError(path, "is in Fortran order", "save it in C order")
    if min(shape, default=1) < 1:
        raise DataError(path, f"has the shape {shape}", _REMEDY)
    expected = dtype.itemsize * math.prod(shape)
    if size - length != expected:
        fault = f"holds {size - length} bytes of data; its header says {expected}"
        raise DataError(path, fault, _REMEDY)
    return shape, dtype, length


def _read_target(path: Path) -> npt.NDArray[np.float32]:
    """Return the target that belongs to the counts in `path`."""
    label = Path(_label_path(path))
    return check_target(label, parse_npy(label, read_file(label)))


def _label_path(path: Location) -> Location:
    """Return the file of the target that belongs to the counts in `path`."""
    return path.with_name(path.name.removesuffix(DATA_SUFFIX) + LABEL_SUFFIX)


_PARSER_LOCK = threading.Lock()
"""Python's parser, which numpy uses on headers, is not thread-safe."""


@functools.lru_cache(maxsize=8)
def _parse_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, Fortran order, dtype); cached, as a data set has but one or two different headers."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"npy version {version[0]}.{version[1]}")
    return np.lib.format.read_array_header_1_0(file)
