"""The gather on the host: each voxel's row of a table, by its byte planes; see docs/packed.md."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_ITEM = 16
"""Bytes of a row that gather.c copies, and the alignment of `out` that it needs."""

_Planes = ctypes.c_char_p * 4

_threads = threading.local()


def gather_rows(
    planes: Sequence[bytes], table: npt.NDArray[Any], out: npt.NDArray[Any]
) -> tuple[int, int] | None:
    """Write each voxel's row of `table` into `out`.

    Thread-safe; the GIL is released most of the time.

    Args:
        planes: bytes of the row indices: the lowest byte of every voxel, the next byte of every voxel, ....
        table: (rows, C), contiguous.
        out: (voxels, C), contiguous, of the same dtype.

    Returns:
        None; or if a row index is beyond the table, a voxel with the highest one, and that index.
    """
    contiguous = out.flags.carray and table.flags.c_contiguous
    if not contiguous or out.dtype != table.dtype or out.shape[1:] != table.shape[1:]:
        raise ValueError("table and output must be contiguous, of one dtype and of equal rows")
    if any(len(plane) != len(out) for plane in planes):
        raise ValueError(f"{len(out)} voxels, but planes of {[len(plane) for plane in planes]} bytes")
    if _compiled is None or table[:1].nbytes != _ITEM or out.ctypes.data % _ITEM:
        return _gather_numpy(planes, table, out)
    source, target = table.ctypes.data, out.ctypes.data
    highest = _compiled(_Planes(*planes), len(planes), len(out), source, len(table), target)
    # NumPy finds the voxel.
    return None if highest < len(table) else _gather_numpy(planes, table, out)


def _gather_numpy(
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
    # With a voxel's values as one item, NumPy copies them in one piece. Mode "wrap" needs no buffer.
    item = np.dtype((np.void, table[:1].nbytes))
    np.take(table.view(item)[:, 0], wide, out=out.view(item)[:, 0], mode="wrap")
    return None


def _scratch(voxels: int, dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], ...]:
    """Return this thread's scratch arrays for `voxels` rows: two of `dtype`, and one of int64.

    They are kept, as allocating them in every call would cost more than the gather.
    """
    key = (voxels, dtype)
    if getattr(_threads, "key", None) != key:
        _threads.key = key
        _threads.rows = tuple(np.empty(voxels, kind) for kind in (dtype, dtype, np.int64))
    rows: tuple[npt.NDArray[Any], ...] = _threads.rows
    return rows


def _load() -> Callable[..., int] | None:
    """Load gather.c; None if it was not compiled."""
    try:
        compiled: Any = np.ctypeslib.load_library("_gather", __file__).gather_rows_1
    except (OSError, AttributeError):
        # Not built; or for another kind of machine that shares this checkout, or from an older gather.c.
        return None
    compiled.restype = ctypes.c_uint32
    pointer = ctypes.c_void_p
    compiled.argtypes = [_Planes, ctypes.c_int, ctypes.c_size_t, pointer, ctypes.c_uint32, pointer]
    return compiled


_compiled = _load()
COMPILED = _compiled is not None
"""True if `gather_rows` is compiled; NumPy's is slower."""
