"""A packed sample on a device: what is sent there of it, and the volume that torch makes of it there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.header import BYTE_SUM_MODULUS

PackedArrays = tuple[list[npt.NDArray[Any]], ...]
"""What the packed graph takes of a batch: see `define_packed_graph`."""


def arrays_of(batch: Sequence[PackedSample]) -> PackedArrays:
    """`batch` as the packed graph takes it, each table with a row of -1 behind it: NaN to be."""
    columns = []
    for packed in batch:
        first = int(packed.starts[0, 0])
        columns.append(
            (
                np.frombuffer(packed.content, np.uint8)[first:],
                (packed.starts.ravel() - first).astype(np.int32),
                packed.sizes.ravel().astype(np.int32),
                np.array([packed.voxels], np.int32),
                np.pad(packed.table, ((0, 1), (0, 0)), constant_values=-1),
            )
        )
    return tuple(map(list, zip(*columns, strict=True)))


def gather(
    blocks: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    *,
    planes: int,
    total: int,
    by_mean: bool,
) -> None:
    """Write each voxel's values into `out` (D, H, W, C), of any floating dtype, contiguous.

    blocks: (chunks * planes, voxels of a chunk) uint8, the inflated blocks. table: (rows + 1, C)
    float32, whose last row is NaN: what a voxel gets whose row is not in the table, so that damage is
    noticed and nothing is read out of bounds. planes, total: see `PackedSample`; all voxels get NaN where the
    bytes have another total, as DALI does not tell of a block that is none or is too short. by_mean:
    divide by the mean of all values.
    """
    found = blocks.sum(dtype=torch.int64) % BYTE_SUM_MODULUS
    table = torch.where(found == total, table, torch.nan)
    parts = blocks.view(-1, planes, blocks.shape[-1])
    rows = parts[:, 0].long()
    for plane in range(1, planes):
        rows |= parts[:, plane].long() << 8 * plane
    rows = rows.view(-1).clamp_(max=len(table) - 1)
    if by_mean:
        times = torch.bincount(rows, minlength=len(table))[:-1].double()
        table = table / (times @ table[:-1].double()).sum().div(rows.numel() * table.shape[-1]).float()
    torch.index_select(table.to(out.dtype), 0, rows, out=out.view(-1, table.shape[-1]))
