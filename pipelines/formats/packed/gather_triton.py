"""The gather of packed samples on a GPU in one Triton kernel; `gather_gpu.gather` is its reference.

A kernel reads each plane once and writes each voxel once: 21 MB for a sample of 128^3 in half precision.
Torch's operations move 190 MB for it. Runs on a GPU and, with TRITON_INTERPRET=1, on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipelines.formats.packed.gather_gpu import divide_by_mean, row_indices

_VOXELS = 2048
"""Voxels of a program: 8 consecutive ones, a 64-bit load of each plane, for each of its 256 threads."""

_WARPS = 8

_CHECK_WORDS = 16384
"""Words of a program of `_invalidate`."""


def gather(
    blocks: torch.Tensor, table: torch.Tensor, out: torch.Tensor, *, planes: int, byte_sum: int, by_mean: bool
) -> None:
    """Write each voxel's values into `out`, as `gather_gpu.gather` does; `out` must be contiguous."""
    if by_mean:
        table = divide_by_mean(table, row_indices(blocks, planes, len(table)))
    table = table.to(out.dtype)
    chunks, chunk_voxels = len(blocks) // planes, blocks.shape[-1]
    # The kernel copies rows as 64-bit words, so it needs no arithmetic in the dtype.
    words, written = table.view(torch.int64), out.view(-1, out.shape[-1]).view(torch.int64)
    found = torch.zeros(1, dtype=torch.int32, device=out.device)
    row_words = words.shape[1]
    _gather[(triton.cdiv(chunk_voxels, _VOXELS), chunks)](
        blocks, words, found, written, chunk_voxels, len(table) - 1,
        PLANES=planes, ROW_WORDS=row_words, VOXELS=_VOXELS, num_warps=_WARPS,
    )  # fmt: skip
    expected = byte_sum - (1 << 32) if byte_sum >= 1 << 31 else byte_sum
    _invalidate[(triton.cdiv(written.numel(), _CHECK_WORDS),)](
        words, found, written, expected, written.numel(), len(table) - 1,
        ROW_WORDS=row_words, WORDS=_CHECK_WORDS, num_warps=_WARPS,
    )  # fmt: skip


# Not specialised by what differs between samples: a step would wait for the compiler.
@triton.jit(do_not_specialize=["last"])
def _gather(
    blocks, words, found, written, chunk_voxels, last,
    PLANES: tl.constexpr, ROW_WORDS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    inside = voxel < chunk_voxels
    plane = blocks + chunk.to(tl.int64) * PLANES * chunk_voxels
    row = tl.load(plane + voxel, mask=inside, other=0).to(tl.uint32)
    total = tl.sum(row.to(tl.int32), 0)
    for number in tl.static_range(1, PLANES):
        plane += chunk_voxels
        high = tl.load(plane + voxel, mask=inside, other=0).to(tl.uint32)
        total += tl.sum(high.to(tl.int32), 0)
        row |= high << (8 * number)
    # Sums wrap at 2^32, as the header's do, and integers add up to the same in any order.
    tl.atomic_add(found, total, sem="relaxed")
    row = tl.minimum(row, last.to(tl.uint32)).to(tl.int32)
    at = (chunk.to(tl.int64) * chunk_voxels + voxel) * ROW_WORDS
    for word in tl.static_range(ROW_WORDS):
        tl.store(written + at + word, tl.load(words + row * ROW_WORDS + word, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["expected", "last"])
def _invalidate(
    words, found, written, expected, count, last, ROW_WORDS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    if tl.load(found) != expected:
        nan = tl.load(words + last * ROW_WORDS)
        at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
        tl.store(written + at, nan, mask=at < count)
