"""Universes as the published set keeps them: HDF5 files of counts and targets.

`full` holds the counts, (n, n, n, redshifts) integers, and `unitPar` the target, (4,) floats in
[-1, 1] (https://portal.nersc.gov/project/m3363/).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipelines.dataset.manifest import SourceFingerprint
from pipelines.errors import AccessError, DataError
from pipelines.formats.registry import FORMATS
from pipelines.io import WrittenFile
from pipelines.sample import COUNT_LIMIT, Sample, check_target
from preprocess.conversion.task_result import make_entries

COUNTS, TARGET = "full", "unitPar"


def universe_shape(path: Path) -> tuple[int, int, int, int]:
    """The shape of the counts in the universe at `path`, (n, n, n, redshifts); DataError where it is none."""
    with _universe(path) as file:
        with _reading(path):
            shape = file[COUNTS].shape
        if len(shape) != 4 or len(set(shape[:3])) != 1 or 0 in shape:
            raise DataError(path, f"{COUNTS} has shape {shape}", "expected (n, n, n, redshifts)")
        return shape


def crops(path: Path, shape: tuple[int, ...], size: int) -> Iterator[Sample]:
    """The samples of `size`^3 that the universe of `shape` at `path` is cut into, in C order.

    That is axis 0 outermost, then 1, then 2. Holds no more than `size` planes of the universe in
    memory. DataError names any fault.
    """
    with _universe(path) as file:
        with _reading(path):
            counts, found = file[COUNTS], np.asarray(file[TARGET], dtype=np.float32)
            its_shape, dtype = counts.shape, counts.dtype
        target = check_target(path, found)
        if its_shape != shape:
            raise DataError(path, f"{COUNTS} has shape {its_shape}", f"the other universes have {shape}")
        if not np.issubdtype(dtype, np.integer):
            raise DataError(path, f"{COUNTS} is {dtype}", "expected integers: counts of particles")
        for start in range(0, shape[0], size):
            with _reading(path):
                planes = counts[start : start + size]
            lowest, highest = int(planes.min()), int(planes.max())
            if lowest < 0 or highest >= COUNT_LIMIT:
                raise DataError(
                    path, f"counts run from {lowest} to {highest}", f"expected 0 to {COUNT_LIMIT - 1}"
                )
            for j, k in itertools.product(range(0, shape[1], size), range(0, shape[2], size)):
                crop = planes[:, j : j + size, k : k + size]
                yield Sample(np.ascontiguousarray(crop, dtype=np.int16), target)


@contextmanager
def _universe(path: Path) -> Iterator[Any]:
    """The universe at `path`, open, with both of its parts."""
    with _reading(path):
        file = h5py.File(path, "r")
    with file:
        for name in (COUNTS, TARGET):
            with _reading(path):
                part = file.get(name)
            if not isinstance(part, h5py.Dataset):
                raise DataError(path, f"has no data set {name}", "expected a universe of the published set")
        yield file


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises DataError or AccessError of `path` where HDF5 fails; for calls of h5py and nothing else.

    HDF5 has one kind of error for a file that is not there and for one that is no HDF5 file, and h5py
    has others for what it finds in one that is damaged.
    """
    try:
        yield
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # Without HDF5's own words, which name the path again.
            raise AccessError.reading(path, OSError(error.errno, os.strerror(error.errno))) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(path, f"cannot be read as HDF5 ({reason})", "fetch the file again") from error


@dataclass(frozen=True, slots=True)
class Preparation:
    """The task of cutting universes of `shape` into samples of `size`^3, as `format_name` in `target`."""

    shape: list[int]
    size: int
    target: str
    format_name: str

    def __call__(self, job: tuple[str, list[tuple[str, Any]]]) -> dict[str, Any]:
        """Cut the universe at job[0]; see `make_entries` for job[1] and the answer."""
        path, wanted = Path(job[0]), job[1]

        def make() -> Iterator[tuple[str, Sequence[WrittenFile]]]:
            cut = crops(path, tuple(self.shape), self.size)
            for (stem, _), sample in zip(wanted, cut, strict=True):
                yield stem, FORMATS[self.format_name].write(Path(self.target), stem, sample)

        # By what it is cut into, which another size of samples changes.
        stems = [stem for stem, _ in wanted]
        return make_entries(
            Path(self.target), lambda: SourceFingerprint.from_files(stems, [path]), wanted, make
        )
