"""The gather of packed samples on a GPU in Triton; `gather_gpu.gather` is its reference.

A kernel counts the escapes of each of its programs, and a second one writes the voxels once: 22 MB for a
sample of 128^3 in half precision. Torch's operations move 190 MB for it. Runs on a GPU and, with
TRITON_INTERPRET=1, on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pipelines.formats.packed.gather_cpu import ESCAPE
from pipelines.formats.packed.gather_gpu import divide_by_mean, is_escaped, row_numbers

_VOXELS = 2048
"""Voxels of a program: 8 consecutive ones, a 64-bit load, for each of its 256 threads."""

_WARPS = 8

_ESCAPE = tl.constexpr(ESCAPE)


def gather(
    symbols: torch.Tensor,
    escapes: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    *,
    byte_sum: int | None,
    by_mean: bool,
) -> None:
    """Write each voxel's values into `out`, as `gather_gpu.gather` does."""
    symbols, voxels = symbols.view(-1), out[..., 0].numel()
    if by_mean:
        table = divide_by_mean(table, row_numbers(symbols[:voxels], escapes, table)[0])
    table = table.to(out.dtype)
    # The kernel copies rows as 64-bit words, so it needs no arithmetic in the dtype.
    words, written = table.view(torch.int64), out.view(-1, out.shape[-1]).view(torch.int64)
    programs, planes = triton.cdiv(voxels, _VOXELS), len(escapes) if is_escaped(table) else 0
    found = torch.zeros(1, dtype=torch.int32, device=out.device)
    # Of each program, the escapes; then those up to its last voxel.
    ends = torch.empty(programs, dtype=torch.int32, device=out.device)
    _count[(programs,)](symbols, found, ends, voxels, VOXELS=_VOXELS, num_warps=_WARPS)
    ends = ends.cumsum(0, dtype=torch.int32)
    expected = byte_sum or 0
    expected -= (expected >> 31) << 32
    count = escapes.shape[1] - 1
    _gather[(programs,)](
        symbols, escapes, words, found, ends, written, expected, count, voxels, programs, len(table) - 1,
        SUMMED=byte_sum is not None, PLANES=planes, ROW_WORDS=words.shape[1], VOXELS=_VOXELS,
        num_warps=_WARPS,
    )  # fmt: skip


@triton.jit
def _count(symbols, found, ends, voxels, VOXELS: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    voxel = program * VOXELS + tl.arange(0, VOXELS)
    symbol = tl.load(symbols + voxel, mask=voxel < voxels, other=0).to(tl.int32)
    # Sums wrap at 2^32, as the header's do, and integers add up to the same in any order.
    tl.atomic_add(found, tl.sum(symbol, 0), sem="relaxed")
    tl.store(ends + program, tl.sum((symbol == _ESCAPE).to(tl.int32), 0))


# Not specialised by what differs between samples: a step would wait for the compiler.
@triton.jit(do_not_specialize=["expected", "count", "last"])
def _gather(
    symbols, escapes, words, found, ends, written, expected, count, voxels, programs, last,
    SUMMED: tl.constexpr, PLANES: tl.constexpr, ROW_WORDS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    voxel = program * VOXELS + tl.arange(0, VOXELS)
    inside = voxel < voxels
    row = tl.load(symbols + voxel, mask=inside, other=0).to(tl.int32)
    intact = (tl.load(found) == expected) | (not SUMMED)
    if PLANES > 0:
        intact = intact & (tl.load(ends + programs - 1) == count)
        escaped = (row == _ESCAPE).to(tl.int32)
        place = tl.load(ends + program) - tl.sum(escaped, 0) + tl.cumsum(escaped, 0) - escaped
        readable = (escaped > 0) & (place < count)
        added = tl.zeros((VOXELS,), tl.int64)
        for plane in tl.static_range(PLANES):
            number = tl.load(escapes + plane * (count + 1) + place, mask=readable, other=0)
            added |= number.to(tl.int64) << (8 * plane)
        row = tl.minimum(row + added, last).to(tl.int32)
    row = tl.where(intact, tl.minimum(row, last), last)
    at = voxel.to(tl.int64) * ROW_WORDS
    for word in tl.static_range(ROW_WORDS):
        tl.store(written + at + word, tl.load(words + row * ROW_WORDS + word, mask=inside), mask=inside)
