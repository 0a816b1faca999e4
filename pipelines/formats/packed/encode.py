"""Packing of a sample: counts to table, rows and LZ4 blocks; `decode` is the inverse."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import crc32c
import lz4.block
import numpy as np
import numpy.typing as npt

from pipelines.formats.packed.header import ALIGN, BYTE_SUM_MODULUS, CHECKED, ENTRY, HEADER, MAGIC, VERSION
from pipelines.sample import Sample

CHUNK_VOXELS = 65536
"""A chunk has as many D-slices as stay within this, and at least one: bytes of each plane."""

LEVEL = 9
"""Of LZ4-HC: 12 would save another 0.7% at four times the time."""


def slices_per_chunk(size: int) -> int:
    """D-slices in a chunk of a sample of `size`^3: the most that divide it and stay in CHUNK_VOXELS."""
    fitting = (count for count in range(1, size + 1) if size % count == 0 and count * size**2 <= CHUNK_VOXELS)
    return max(fitting, default=1)


def encode(sample: Sample, *, level: int = LEVEL, slices: int | None = None) -> Iterator[bytes]:
    """`sample` in this format, in pieces.

    level: of LZ4-HC; 0 for the fast compressor. slices: D-slices in a chunk, for who wants to measure.
    """
    counts = sample.counts
    size, channels = counts.shape[0], counts.shape[-1]
    slices = slices_per_chunk(size) if slices is None else slices
    table, rows = tabulate(counts)
    planes = max(1, -(-(len(table) - 1).bit_length() // 8))
    chunks = rows.astype("<u4").reshape(size // slices, -1).view(np.uint8).reshape(size // slices, -1, 4)
    blocks = [_deflate(chunk[:, plane], level) for chunk in chunks for plane in range(planes)]
    of_table = table.astype("<i2").view(np.uint8).reshape(len(table), channels, 2).transpose(2, 1, 0)
    packed_table = _deflate(of_table, level)
    padded = [_pad(block) for block in blocks]
    directory = np.array(
        [(len(block), crc32c.crc32c(whole)) for block, whole in zip(blocks, padded, strict=True)], ENTRY
    ).tobytes()
    fields = (MAGIC, VERSION, size, channels, slices, planes, len(table), len(packed_table))
    sums = crc32c.crc32c(b"".join(padded)), 0, int(chunks.sum(dtype=np.uint64)) % BYTE_SUM_MODULUS
    header = HEADER.pack(*fields, *sample.target.tolist(), *sums)
    rest = header[CHECKED + 4 :] + _pad(directory) + _pad(packed_table)
    crc = crc32c.crc32c(rest, crc32c.crc32c(header[:CHECKED]))
    yield header[:CHECKED] + struct.pack("<I", crc) + rest
    yield from padded


def tabulate(counts: npt.NDArray[np.int16]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """The different voxels (rows, C), the commonest first, and each voxel's row.

    Those that are equally common are sorted by their counts, the last channel first, which lets LZ4
    find more in the table.
    """
    voxels = np.ascontiguousarray(counts).reshape(-1, counts.shape[-1])
    if voxels.shape[-1] == 4:
        keys = voxels.view(np.uint64)[:, 0]
        distinct, rows, times = np.unique(keys, return_inverse=True, return_counts=True)
        table = distinct[:, None].view(np.int16)
    else:
        table, rows, times = np.unique(voxels, axis=0, return_inverse=True, return_counts=True)
    order = np.lexsort((*table.T, -times))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return table[order], place[rows.reshape(-1)]


def _deflate(content: npt.NDArray[np.uint8], level: int) -> bytes:
    mode = {"mode": "high_compression", "compression": level} if level else {"mode": "default"}
    return bytes(lz4.block.compress(content.tobytes(), store_size=False, **mode))


def _pad(content: bytes) -> bytes:
    """`content`, filled up with zeros to the next multiple of the alignment."""
    return content + bytes(-len(content) % ALIGN)
