"""Packed samples on a device: the arrays that DALI takes there, and the gather into volumes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.header import BYTE_SUM_MODULUS

PackedArrays = tuple[list[npt.NDArray[Any]], ...]
"""A batch as the packed graph takes it; see `define_packed_graph`."""

Gather: TypeAlias = Callable[..., None]
"""`gather`, or a function of the same parameters and results."""

logger = logging.getLogger(__name__)


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


def choose_gather(device: torch.device) -> Gather:
    """Return Triton's gather if it equals torch's on `device`, otherwise torch's, and log the reason."""
    try:
        from pipelines.formats.packed import gather_triton

        if _equals(gather_triton.gather, device):
            return gather_triton.gather
        reason = "it writes other values than torch's"
    except Exception as error:  # an import, or a compiler, which raises many types
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    logger.warning(
        "packed samples are gathered by torch, more slowly: Triton's kernel is left out (%s)", reason
    )
    return gather


def _equals(candidate: Gather, device: torch.device) -> bool:
    """Return True if `candidate` writes the same bits as `gather`, for intact and for damaged samples."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 4, (6, 5000), dtype=torch.uint8, generator=generator)
    table = torch.randn(800, 4, generator=generator)
    # Rows of 256 to 511 are beyond this one.
    short = table[:300].clone()
    table[-1] = short[-1] = torch.nan
    byte_sum = int(blocks.sum())
    blocks = blocks.to(device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for values, found in ((table, byte_sum), (short, byte_sum), (table, byte_sum + 1)):
            results = []
            for function in (gather, candidate):
                out = torch.zeros(15000, 4, dtype=dtype, device=device)
                function(blocks, values.to(device), out, planes=2, byte_sum=found, by_mean=False)
                results.append(out.view(torch.int16))
            if not torch.equal(*results):
                return False
    return True
