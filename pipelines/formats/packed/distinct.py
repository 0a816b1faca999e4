"""The distinct voxels of a sample, which are the rows of its table; see docs/packed.md."""

from __future__ import annotations

import ctypes
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.formats.packed.compiled import load
from pipelines.formats.packed.gather_cpu import ESCAPE

_ITEM = 8
"""Bytes of a voxel that distinct.c compares: int16 at four redshifts."""

_PIECE = 1 << 16
"""Voxels that get their rows at a time."""


def tabulate(counts: npt.NDArray[np.int16]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint32]]:
    """Return the distinct voxels of `counts` (D, H, W, C), and each voxel's row among them.

    Returns:
        The table (rows, C) int16. The ESCAPE most frequent voxels are first, the most frequent one of all at
        the start. The others follow by the smallest power of two that is not below their frequency; those of
        one power, and equally frequent ones among the first, are sorted by their counts, the last channel
        first. That compresses the table better than an exact order by frequency, which only a symbol needs.
        The row of each voxel (voxels,) uint32.
    """
    voxels = np.ascontiguousarray(counts).reshape(-1, counts.shape[-1])
    fast = _compiled is not None and voxels.strides[0] == _ITEM
    table, rows, frequency = (_find if fast else _find_numpy)(voxels)
    order = np.lexsort((*table.T, -frequency))
    others = order[ESCAPE:]
    power = np.frexp(frequency[others] - 1)[1]
    order[ESCAPE:] = others[np.lexsort((*table[others].T, -power))]
    rank = np.empty(len(order), np.uint32)
    rank[order] = np.arange(len(order))
    for start in range(0, len(rows), _PIECE):
        # NumPy makes an int64 index of the piece. Mode "wrap" is faster, as it checks no bounds.
        piece = rows[start : start + _PIECE]
        np.take(rank, piece, out=piece, mode="wrap")
    return table[order], rows


def _find(voxels: npt.NDArray[np.int16]) -> tuple[npt.NDArray[Any], ...]:
    """Return the distinct ones of `voxels` (voxels, C), each one's row among them, and their frequencies."""
    count = len(voxels)
    bits = (2 * count - 1).bit_length()
    # For the worst case; memory that is not written is not taken.
    slots, distinct = np.empty(1 << bits, np.uint32), np.empty((count, voxels.shape[-1]), np.int16)
    frequency, rows = np.empty(count, np.uint32), np.empty(count, np.uint32)
    slots_at, *results = (array.ctypes.data for array in (slots, distinct, frequency, rows))
    seed = secrets.randbits(64) | 1
    found = _compiled.find_distinct_1(voxels.ctypes.data, count, seed, slots_at, bits, *results)
    return distinct[:found], rows, frequency[:found].astype(np.int64)


def _find_numpy(voxels: npt.NDArray[np.int16]) -> tuple[npt.NDArray[Any], ...]:
    """Return what `_find` does, in another order; also for other numbers of channels."""
    if voxels.shape[-1] == 4:
        keys = voxels.view(np.uint64)[:, 0]
        distinct, rows, frequency = np.unique(keys, return_inverse=True, return_counts=True)
        table = distinct[:, None].view(np.int16)
    else:
        table, rows, frequency = np.unique(voxels, axis=0, return_inverse=True, return_counts=True)
    return table, rows.reshape(-1).astype(np.uint32), frequency


_POINTER = ctypes.c_void_p

_compiled = load(
    "_distinct",
    find_distinct_1=(
        ctypes.c_uint32,
        (_POINTER, ctypes.c_size_t, ctypes.c_uint64, _POINTER, ctypes.c_int, *[_POINTER] * 3),
    ),
)
COMPILED = _compiled is not None
"""True if the voxels are found by distinct.c; NumPy takes about ten times as long."""
