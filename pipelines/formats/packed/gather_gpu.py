"""Packed samples on a device: the arrays that DALI takes there, and the gather into volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.header import BYTE_SUM_MODULUS

PackedArrays = tuple[list[npt.NDArray[Any]], ...]
"""A batch as the packed graph takes it; see `define_packed_graph`."""


def arrays_of(batch: Sequence[PackedSample]) -> PackedArrays:
    """Return `batch` as the packed graph takes it; each table gets a last row of -1, which becomes NaN."""
    samples = []
    for packed in batch:
        first = int(packed.starts[0, 0])
        blocks = np.frombuffer(packed.content, np.uint8)[first:]
        starts = (packed.starts.ravel() - first).astype(np.int32)
        sizes = packed.sizes.ravel().astype(np.int32)
        voxels = np.array([packed.header.chunk_voxels], np.int32)
        table = np.pad(packed.table, ((0, 1), (0, 0)), constant_values=-1)
        samples.append((blocks, starts, sizes, voxels, table))
    return tuple(map(list, zip(*samples, strict=True)))


def gather(
    blocks: torch.Tensor, table: torch.Tensor, out: torch.Tensor, *, planes: int, byte_sum: int, by_mean: bool
) -> None:
    """Write each voxel's values into `out`.

    A row index beyond the table gets the table's last row, NaN, so that damage is noticed and
    nothing is read out of bounds. All voxels get NaN where the sum of the blocks is not `byte_sum`:
    DALI does not report a block that is damaged or too short.

    Args:
        blocks: (chunks * planes, voxels of a chunk) uint8, the inflated blocks.
        table: (rows + 1, C) float32, the last row NaN.
        out: (D, H, W, C) of any floating dtype, contiguous.
        planes, byte_sum: those of the sample's `Header`.
        by_mean: divide by the mean of all values.
    """
    rows = row_indices(blocks, planes, len(table))
    found = blocks.sum(dtype=torch.int64) % BYTE_SUM_MODULUS
    table = torch.where(found == byte_sum, table, torch.nan)
    if by_mean:
        table = divide_by_mean(table, rows)
    torch.index_select(table.to(out.dtype), 0, rows, out=out.view(-1, table.shape[-1]))


def row_indices(blocks: torch.Tensor, planes: int, rows: int) -> torch.Tensor:
    """Return each voxel's row, (voxels,) int64, at most `rows` - 1, from its planes in `blocks`."""
    chunks = blocks.view(-1, planes, blocks.shape[-1])
    indices = chunks[:, 0].long()
    for plane in range(1, planes):
        indices |= chunks[:, plane].long() << 8 * plane
    return indices.view(-1).clamp_(max=rows - 1)


def divide_by_mean(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `table` divided by the mean of all values of the voxels `rows`; the last row counts as zeros."""
    sums = table.double().sum(1)
    sums[-1] = 0
    # Not by bincount, which waits for the device.
    mean = sums[rows].sum() / (rows.numel() * table.shape[-1])
    return table / mean.float()
