"""The gather on the host: each voxel's row of a table, by symbols and escapes; see docs/packed.md."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.formats.packed.compiled import load

ESCAPE = 255
"""Symbol of a voxel whose row is among the escapes, in tables of more rows than there are symbols."""

_ITEM = 16
"""Bytes of a row that gather.c copies, and the alignment of `out` that it needs."""


def gather_rows(
    symbols: bytes, escapes: npt.NDArray[np.uint32] | None, table: npt.NDArray[Any], out: npt.NDArray[Any]
) -> str | None:
    """Write each voxel's row of `table` into `out`.

    Thread-safe; the GIL is released most of the time.

    Args:
        symbols: a byte for each voxel.
        escapes: the rows, less ESCAPE, of the voxels with the symbol ESCAPE; None if symbols are rows.
        table: (rows, C), contiguous.
        out: (voxels, C), contiguous, of the same dtype.

    Returns:
        None; or the fault if a row is beyond the table, or there are more or fewer escapes than symbols for
        them. `out` is then not complete.
    """
    contiguous = out.flags.carray and table.flags.c_contiguous
    if not contiguous or out.dtype != table.dtype or out.shape[1:] != table.shape[1:]:
        raise ValueError("table and output must be contiguous, of one dtype and of equal rows")
    if len(symbols) != len(out):
        raise ValueError(f"{len(out)} voxels, but {len(symbols)} symbols")
    if _compiled is not None and table[:1].nbytes == _ITEM and not out.ctypes.data % _ITEM:
        rows_at, count = (None, 0) if escapes is None else (escapes.ctypes.data, len(escapes))
        addresses = table.ctypes.data, len(table), out.ctypes.data
        if _compiled.gather_rows_2(symbols, len(symbols), rows_at, count, *addresses):
            return None
    # Also if there is a fault, which NumPy finds.
    return _gather_numpy(symbols, escapes, table, out)


def join_planes(planes: Sequence[bytes]) -> npt.NDArray[np.uint32]:
    """Join the bytes of numbers: the lowest byte of each, the next byte of each, ...; at least one plane."""
    numbers = np.empty(len(planes[0]), np.uint32)
    if _compiled is not None:
        pointers = (ctypes.c_char_p * len(planes))(*planes)
        _compiled.join_planes_1(pointers, len(planes), len(numbers), numbers.ctypes.data)
        return numbers
    numbers[:] = np.frombuffer(planes[0], np.uint8)
    for number, plane in enumerate(planes[1:], 1):
        numbers |= np.left_shift(np.frombuffer(plane, np.uint8), 8 * number, dtype=np.uint32)
    return numbers


def _gather_numpy(
    symbols: bytes, escapes: npt.NDArray[np.uint32] | None, table: npt.NDArray[Any], out: npt.NDArray[Any]
) -> str | None:
    rows = np.frombuffer(symbols, np.uint8).astype(np.int64)
    if escapes is not None:
        escaped = np.flatnonzero(rows == ESCAPE)
        if len(escaped) != len(escapes):
            return f"has {len(escapes)} escapes for {len(escaped)} symbols"
        rows[escaped] += escapes
    if (highest := int(rows.max())) >= len(table):
        return f"has the row {highest} of a table of {len(table)}"
    # With a voxel's values as one item, NumPy copies them in one piece. Mode "wrap" needs no buffer.
    item = np.dtype((np.void, table[:1].nbytes))
    np.take(table.view(item)[:, 0], rows, out=out.view(item)[:, 0], mode="wrap")
    return None


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t

_compiled = load(
    "_gather",
    gather_rows_2=(
        ctypes.c_int,
        (ctypes.c_char_p, _SIZE, _POINTER, _SIZE, _POINTER, ctypes.c_uint32, _POINTER),
    ),
    join_planes_1=(None, (ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, _SIZE, _POINTER)),
)
COMPILED = _compiled is not None
"""True if `gather_rows` is compiled; NumPy's is slower."""
