"""Universes of the published set, which are HDF5 files, and the task of cutting them into samples.

The data set `full` holds the counts, (n, n, n, redshifts) integers, and `unitPar` the target, (4,) floats in
[-1, 1] (https://portal.nersc.gov/project/m3363/).
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pipelines.dataset.manifest import SourceFingerprint
from pipelines.errors import AccessError, DataError
from pipelines.filesystem import open_regular, report_unsupported
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.format import MEMBER_SUFFIX, PackedFormat
from pipelines.formats.packed.tar_shard import SHARD_SUFFIX, write_shard
from pipelines.formats.registry import FORMATS
from pipelines.formats.signatures import recognize_file
from pipelines.io import WrittenFile
from pipelines.sample import COUNT_LIMIT, Sample, check_target
from pipelines.storage.location import Location
from preprocess.conversion.task_result import Announce, TaskResult, WorkItem, convert_if_stale

COUNTS, TARGET = "full", "unitPar"


def universe_shape(path: Path) -> tuple[int, int, int, int]:
    """Return the shape of the counts in the universe at `path`, (n, n, n, redshifts).

    Raises:
        DataError: The file cannot be read, or is not a universe.
    """
    with _universe(path) as file:
        with _reading(path):
            shape = file[COUNTS].shape
        if len(shape) != 4 or len(set(shape[:3])) != 1 or 0 in shape:
            raise DataError(path, f"{COUNTS} has shape {shape}", "expected (n, n, n, redshifts)")
        return shape


def crops(path: Path, shape: tuple[int, ...], size: int) -> Iterator[Sample]:
    """Yield the samples of `size`^3 of the universe of `shape` at `path`, in C order (axis 0 outermost).

    Holds `size` planes of the universe in memory, and a sample if that is less than the planes.

    Raises:
        DataError: The file cannot be read, is not a universe, or has another shape.
    """
    with _universe(path) as file:
        with _reading(path):
            counts, found_target = file[COUNTS], np.asarray(file[TARGET], dtype=np.float32)
            found_shape, dtype = counts.shape, counts.dtype
        target = check_target(path, found_target)
        if found_shape != shape:
            raise DataError(path, f"{COUNTS} has shape {found_shape}", f"the other universes have {shape}")
        if not np.issubdtype(dtype, np.integer):
            raise DataError(path, f"{COUNTS} is {dtype}", "expected integers: counts of particles")
        for start in range(0, shape[0], size):
            planes = _read_planes(path, counts, start, size)
            for j, k in itertools.product(range(0, shape[1], size), range(0, shape[2], size)):
                yield Sample(np.ascontiguousarray(planes[:, j : j + size, k : k + size]), target)
            # Free them before the next ones are read.
            del planes


def _read_planes(path: Path, counts: h5py.Dataset, start: int, count: int) -> npt.NDArray[np.int16]:
    """Read `count` planes of the universe at `path` from plane `start` on, and check their range."""
    planes = np.empty((count, *counts.shape[1:]), np.int16)
    # A chunk of the file, which HDF5 inflates as a whole, is read once.
    step = counts.chunks[0] if counts.chunks else 1
    for first in range(0, count, step):
        with _reading(path):
            part = counts[start + first : start + min(first + step, count)]
        lowest, highest = int(part.min()), int(part.max())
        if lowest < 0 or highest >= COUNT_LIMIT:
            raise DataError(
                path, f"counts run from {lowest} to {highest}", f"expected 0 to {COUNT_LIMIT - 1}"
            )
        planes[first : first + step] = part
    return planes


@contextmanager
def _universe(path: Path) -> Iterator[Any]:
    """Open the universe at `path` and check that it has both data sets."""
    with _reading(path):
        # HDF5 would wait for the writer of a FIFO.
        os.close(open_regular(path))
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            # EAGAIN: another program has the file open for writing.
            if "unable to lock file" not in str(error) or error.errno == errno.EAGAIN:
                raise
            reason = OSError(error.errno, os.strerror(error.errno or errno.ENOLCK))
            # HDF5 heeds this variable before it heeds `locking`, and reads it only when it is loaded.
            if (value := os.environ.get("HDF5_USE_FILE_LOCKING")) is not None:
                fault = f"cannot be locked ({reason.strerror}), as HDF5_USE_FILE_LOCKING = {value} demands"
                raise AccessError(path, fault, "set HDF5_USE_FILE_LOCKING to FALSE") from error
            report_unsupported(path, "locks", reason, "HDF5 files are read without them")
            file = h5py.File(path, "r", locking=False)
    with file:
        for name in (COUNTS, TARGET):
            with _reading(path):
                found = file.get(name)
            if not isinstance(found, h5py.Dataset):
                raise DataError(path, f"has no data set {name}", "expected a universe of the published set")
            for code, label in _missing_filters(found):
                fault = f"{name} is compressed with the HDF5 filter {code}{f' ({label})' if label else ''}"
                raise DataError(
                    path, fault, "set HDF5_PLUGIN_PATH to its plugin, or rewrite the file: h5repack -f GZIP=4"
                )
        yield file


def _missing_filters(dataset: h5py.Dataset) -> list[tuple[int, str]]:
    """Return number and name of each filter of `dataset` that this HDF5 neither has nor finds as a plugin."""
    settings = dataset.id.get_create_plist()
    filters = (settings.get_filter(index) for index in range(settings.get_nfilters()))
    return [(code, name.decode()) for code, _, _, name in filters if not h5py.h5z.filter_avail(code)]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise DataError or AccessError of `path` where HDF5 fails; for calls of h5py and nothing else.

    HDF5 raises the same exception for a missing file and for one that is not HDF5; h5py raises others for a
    damaged one.
    """
    try:
        yield
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # HDF5's own message repeats the path.
            raise AccessError.reading(path, OSError(error.errno, os.strerror(error.errno))) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        kind = recognize_file(path)
        if kind and kind != "an HDF5 file":
            reason = f"it holds {kind}"
        raise DataError(path, f"cannot be read as HDF5 ({reason})", "download the file again") from error


@dataclass(frozen=True, slots=True)
class CropTask:
    """Cut universes of `shape` into samples of `size`^3, as `format_name` in `target`.

    The source of a work item is the path of a universe and the IDs of its crops, in C order. Its entries are
    the crops, or one shard of them all.
    """

    shape: tuple[int, int, int, int]
    size: int
    target: Location
    format_name: str

    def __call__(self, item: WorkItem) -> TaskResult:
        """Cut the universe of `item` unless its entries are up to date."""
        path: Path
        sample_ids: Sequence[str]
        path, sample_ids = item.source

        def convert(announce: Announce) -> Iterator[tuple[str, Sequence[WrittenFile]]]:
            samples = zip(sample_ids, crops(path, self.shape, self.size), strict=True)
            if self.format_name == PackedFormat.name:
                (name,) = item.entries
                members = ((sample_id + MEMBER_SUFFIX, encode(sample)) for sample_id, sample in samples)
                yield name, write_shard(self.target / (name + SHARD_SUFFIX), members, before=announce)
            else:
                for sample_id, sample in samples:
                    yield sample_id, FORMATS[self.format_name].write(self.target, sample_id, sample)

        # The names are part of the fingerprint: another size of samples gives other ones.
        return convert_if_stale(
            item, self.target, lambda: SourceFingerprint.from_files(sample_ids, [path]), convert
        )
