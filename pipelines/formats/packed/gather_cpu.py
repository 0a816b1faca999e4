"""Each voxel's values, by the row of a table that its byte planes name, on the host; see docs/packed.md."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SCRATCH = 17
"""Bytes that a thread needs by numpy for each voxel of samples with two planes, all in all; compiled, 5."""

_ITEM = 16
"""Bytes of a row that gather.c copies, and what it wants `out` to be aligned to."""

_Planes = ctypes.c_char_p * 4

_threads = threading.local()


def gather_rows(
    planes: Sequence[bytes], table: npt.NDArray[Any], out: npt.NDArray[Any]
) -> tuple[int, int] | None:
    """Write each voxel's row of `table` (rows, C) into `out` (voxels, C), both contiguous and of one dtype.

    planes: the bytes of the rows' numbers: the lowest one of every voxel, the next one of every voxel, ....
    None; or where a row is not in the table, a voxel that has the highest one, and that row. Safe in
    many threads; the GIL is free most of the time. ValueError where these do not go together.
    """
    if not (out.flags.carray and table.flags.c_contiguous and out.dtype == table.dtype):
        raise ValueError("the table and the output must be contiguous and of one dtype, and this writeable")
    if out.shape[1:] != table.shape[1:]:
        raise ValueError(f"the table has rows of {table.shape[1:]}, and the output of {out.shape[1:]}")
    if any(len(plane) != len(out) for plane in planes):
        raise ValueError(f"{len(out)} voxels, and planes of {[len(plane) for plane in planes]}")
    if _compiled is None or table[:1].nbytes != _ITEM or out.ctypes.data % _ITEM:
        return _gather_by_numpy(planes, table, out)
    source, target = table.ctypes.data, out.ctypes.data
    highest = _compiled(_Planes(*planes), len(planes), len(out), source, len(table), target)
    # Numpy finds the voxel that has it.
    return None if highest < len(table) else _gather_by_numpy(planes, table, out)


def _gather_by_numpy(
    planes: Sequence[bytes], table: npt.NDArray[Any], out: npt.NDArray[Any]
) -> tuple[int, int] | None:
    dtype = np.dtype(np.uint16 if len(planes) <= 2 else np.uint32)
    narrow, shifted, wide = _scratch(len(out), dtype)
    for number, plane in enumerate(planes):
        lowest = np.frombuffer(plane, np.uint8)
        if number:
            narrow |= np.left_shift(lowest, 8 * number, out=shifted, dtype=dtype)
        else:
            np.copyto(narrow, lowest)
    highest = int(narrow.max())
    if highest >= len(table):
        return int(narrow.argmax()), highest
    np.copyto(wide, narrow)
    # A voxel's values as one item: numpy copies it in one piece. "wrap" is a mode that needs no buffer.
    item = np.dtype((np.void, table[:1].nbytes))
    np.take(table.view(item)[:, 0], wide, out=out.view(item)[:, 0], mode="wrap")
    return None


def _scratch(voxels: int, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], ...]:
    """This thread's room for `voxels` rows: two arrays of `dtype`, and one of int64, which numpy takes.

    New memory for every call would cost more than what is done in it.
    """
    key = (voxels, dtype)
    if getattr(_threads, "key", None) != key:
        _threads.key = key
        _threads.rows = tuple(np.empty(voxels, kind) for kind in (dtype, dtype, np.int64))
    rows: tuple[npt.NDArray[Any], ...] = _threads.rows
    return rows


def _load() -> Callable[..., int] | None:
    """gather.c, where setup had a compiler for it."""
    found = importlib.util.find_spec("pipelines.formats.packed._gather")
    if found is None or found.origin is None:
        return None
    try:
        compiled: Any = ctypes.CDLL(found.origin).gather_rows_1
    except (OSError, AttributeError):
        # Built elsewhere, for a checkout that machines of several kinds share, or of an older gather.c.
        return None
    compiled.restype = ctypes.c_uint32
    compiled.argtypes = [
        _Planes,
        ctypes.c_int,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
    ]
    return compiled


_compiled = _load()
COMPILED = _compiled is not None
"""Whether `gather_rows` is compiled; without that it is numpy's, and slower."""
