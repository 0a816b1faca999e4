"""Packed samples on a device: the arrays that DALI takes there, and the gather into volumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import lz4.block
import numpy as np
import numpy.typing as npt
import torch
import zstandard

from pipelines.formats.packed.codecs import Codec
from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.gather_cpu import ESCAPE
from pipelines.formats.packed.header import BYTE_SUM_MODULUS, SYMBOLS

Arrays = tuple[npt.NDArray[Any], ...]

Gather: TypeAlias = Callable[..., None]
"""`gather`, or a function of the same parameters and results."""


class DeviceSample(NamedTuple):
    """A packed sample for the device.

    Attributes:
        arrays: what the packed graph takes of it; see `packed_nodes`.
        byte_sum: sum of its symbols by the header; None if only some of its chunks were read.
        starts, sizes: offset and length of each block of symbols in the first of `arrays`.
        voxels: number of symbols.
        planes, skipped: `PackedSample.window`.
    """

    arrays: Arrays
    byte_sum: int | None
    starts: list[int]
    sizes: list[int]
    voxels: int
    planes: slice
    skipped: int


def device_sample(packed: PackedSample, codec: Codec) -> DeviceSample:
    """Return `packed` for a device that inflates blocks of `codec`, or none (STORED).

    Symbols in another codec are inflated here, and compressed again for the device's. The escapes are always
    inflated here, as they are few. Thread-safe; the GIL is released most of the time.

    Raises:
        DataError: a block does not inflate.
    """
    header, chunks = packed.header, packed.chunks
    escapes = packed.escapes()
    planes = np.zeros((max(1, len(escapes)), 1 + int(chunks.escapes.sum())), np.uint8)
    for plane, content in zip(planes, escapes, strict=False):
        plane[:-1] = np.frombuffer(content, np.uint8)
    table = np.pad(packed.table, ((0, 1), (0, 0)), constant_values=-1)
    # DALI inflates all chunks to the same length, and has zeros after a shorter one.
    if codec == header.codecs[1] != Codec.STORED and (chunks.voxels[:-1] == header.chunk_voxels).all():
        blocks = np.frombuffer(packed.content, np.uint8)[chunks.extent]
        starts, sizes = chunks.starts[:, 0] - chunks.extent.start, chunks.sizes[:, 0]
    else:
        contents = _compress(packed.symbols(chunks), header.chunk_voxels, codec)
        blocks, sizes = np.frombuffer(b"".join(contents), np.uint8), np.array(list(map(len, contents)))
        starts = np.cumsum(sizes) - sizes
    arrays: Arrays = (blocks, planes, table)
    if codec == Codec.LZ4:
        extents = starts.astype(np.int32), sizes.astype(np.int32), np.array([header.chunk_voxels], np.int32)
        arrays = (blocks, *extents, planes, table)
    byte_sum = header.byte_sum if packed.slab is None else None
    voxels = int(chunks.voxels.sum())
    return DeviceSample(arrays, byte_sum, starts.tolist(), sizes.tolist(), voxels, *packed.window)


def _compress(symbols: bytes, chunk_voxels: int, codec: Codec) -> list[bytes]:
    """Return the blocks of `codec` for symbols that were in another one, fast rather than small."""
    if codec == Codec.STORED:
        return [symbols]
    chunks = [symbols[start : start + chunk_voxels] for start in range(0, len(symbols), chunk_voxels)]
    if codec == Codec.LZ4:
        return [lz4.block.compress(chunk, store_size=False) for chunk in chunks]
    return [zstandard.compress(chunk, 1) for chunk in chunks]


def gather(
    symbols: torch.Tensor,
    escapes: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    *,
    byte_sum: int | None,
    by_mean: bool,
) -> None:
    """Write each voxel's values into `out`.

    A row beyond the table gets the table's last row, NaN, so that damage is noticed and nothing is read out
    of bounds. All voxels get NaN where the sum of the symbols is not `byte_sum`, as DALI does not report a
    block that is damaged or too short, or where there are more or fewer escapes than symbols for them.

    Args:
        symbols: uint8, contiguous, one for each voxel, and zeros after them.
        escapes: (planes, escapes + 1) uint8, as of `gather_cpu.gather_rows` and an unused last column.
            Ignored if a symbol can number every row.
        table: (rows + 1, C) float32, the last row NaN.
        out: (..., C) of any floating dtype, contiguous.
        byte_sum: that of the `DeviceSample`.
        by_mean: divide by the mean of all values.
    """
    symbols = symbols.view(-1)[: out[..., 0].numel()]
    rows, valid = row_numbers(symbols, escapes, table)
    if byte_sum is not None:
        valid &= symbols.sum(dtype=torch.int64) % BYTE_SUM_MODULUS == byte_sum
    table = torch.where(valid, table, torch.nan)
    if by_mean:
        table = divide_by_mean(table, rows)
    torch.index_select(table.to(out.dtype), 0, rows, out=out.view(-1, table.shape[-1]))


def gather_sample(
    gather: Gather,
    sample: DeviceSample,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    *,
    by_mean: bool,
) -> None:
    """Write the voxels of `sample` into `out` (D, H, W, C), and zeros where a slab extends beyond the sample.

    Args:
        inputs: symbols, escapes and table of the sample on the device; see `gather`.
    """
    if sample.byte_sum is not None:
        gather(*inputs, out, byte_sum=sample.byte_sum, by_mean=by_mean)
        return
    # The first and the last chunk of a slab may have voxels outside it.
    voxels, window = out.new_empty(sample.voxels, out.shape[-1]), out[sample.planes]
    gather(*inputs, voxels, byte_sum=None, by_mean=by_mean)
    window.copy_(voxels[sample.skipped :][: window[..., 0].numel()].view(window.shape))
    out[: sample.planes.start] = out[sample.planes.stop :] = 0


def is_escaped(table: torch.Tensor) -> bool:
    """Return True if `table`, with its row of NaN, has more rows than there are symbols."""
    return len(table) - 1 > SYMBOLS


def row_numbers(
    symbols: torch.Tensor, escapes: torch.Tensor, table: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each voxel's row, (voxels,) int64, at most the last of `table`; and True if all escapes fit."""
    rows = symbols.long()
    valid = torch.ones((), dtype=torch.bool, device=rows.device)
    if is_escaped(table):
        escaped = rows == ESCAPE
        place = escaped.cumsum(0)
        count = escapes.shape[1] - 1
        valid = place[-1] == count
        numbers = torch.zeros(count + 1, dtype=torch.int64, device=rows.device)
        for number, plane in enumerate(escapes):
            numbers |= plane.long() << 8 * number
        # Where there are too many, the unused last one is read.
        rows += torch.where(escaped, numbers[(place - 1).clamp_(0, count)], 0)
    return rows.clamp_(max=len(table) - 1), valid


def divide_by_mean(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return `table` divided by the mean of all values of the voxels `rows`; the last row counts as zeros."""
    sums = table.double().sum(1)
    sums[-1] = 0
    # Not by bincount, which waits for the device.
    mean = sums[rows].sum() / (rows.numel() * table.shape[-1])
    return table / mean.float()
