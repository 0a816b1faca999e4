"""Reading of packed samples of version 2, which nothing writes any more.

It has the bytes of every voxel's row in planes (all low bytes, all second bytes, ...), instead of symbols and
escapes. A chunk is a number of D-slices. Every block is LZ4, and padded to a multiple of 16 bytes.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.formats.packed.codecs import MAX_RATIO, REMEDY, Codec, inflate
from pipelines.formats.packed.encode import UNCOMPRESSED, encode_rows
from pipelines.formats.packed.gather_cpu import join_planes
from pipelines.formats.packed.header import read_table
from pipelines.storage.location import Location

VERSION = 2
_FIELDS = struct.Struct("<8s7I4fIII")
_CRC_OFFSET = 56
_BLOCK = np.dtype([("bytes", "<u4"), ("crc32c", "<u4")])
_ALIGN = 16
_MAX_PLANES = 4

_Length = TypeVar("_Length", int, npt.NDArray[np.int64])


def upgrade(path: Location, content: memoryview) -> bytes:
    """Return the sample `content` of version 2 in version 3, uncompressed.

    Args:
        path: file that errors name.

    Raises:
        DataError: `content` is damaged.
    """
    if len(content) < _FIELDS.size:
        raise DataError(path, f"is cut off after {len(content)} bytes", REMEDY)
    _, _, *numbers, chunks_crc, crc, _ = _FIELDS.unpack_from(content)
    size, channels, slices, planes, rows, table_bytes, *target = numbers
    valid = (
        0 < size < 1 << 16
        and 0 < channels < 1 << 8
        and 0 < slices <= size
        and size % slices == 0
        and 0 < planes <= _MAX_PLANES
        and 0 < rows <= min(size**3, 1 << 8 * planes)
        and rows * channels * 2 <= table_bytes * MAX_RATIO[Codec.LZ4]
    )
    if not valid:
        raise DataError(path, f"its header is not valid ({numbers[:6]})", REMEDY)
    chunks, voxels = size // slices, slices * size**2
    table_start = _aligned(_FIELDS.size + chunks * planes * _BLOCK.itemsize)
    chunks_start = _aligned(table_start + table_bytes)
    if len(content) < chunks_start:
        fault = f"is cut off: {len(content)} bytes, and its chunks start at {chunks_start}"
        raise DataError(path, fault, REMEDY)
    found = crc32c.crc32c(content[_CRC_OFFSET + 4 : chunks_start], crc32c.crc32c(content[:_CRC_OFFSET]))
    if found != crc:
        raise DataError(path, "the CRC of its header is wrong", REMEDY)
    sizes = np.frombuffer(content, _BLOCK, chunks * planes, _FIELDS.size)["bytes"].astype(np.int64)
    ends = chunks_start + np.cumsum(_aligned(sizes))
    end = int(ends[-1])
    if len(content) != end:
        raise DataError(path, f"has {len(content)} bytes; its chunks end at {end}", REMEDY)
    if crc32c.crc32c(content[chunks_start:end]) != chunks_crc:
        raise DataError(path, "the CRC of its chunks is wrong", REMEDY)
    if (sizes * MAX_RATIO[Codec.LZ4] < voxels).any():
        raise DataError(path, "a chunk is too short for its inflated length", REMEDY)
    table = read_table(path, content[table_start:][:table_bytes], Codec.LZ4, rows, channels)
    starts, lengths = ends - _aligned(sizes), np.full(len(sizes), voxels)
    inflated = inflate(path, Codec.LZ4, content, starts, sizes, lengths, "its chunks")
    by_plane = np.frombuffer(inflated, np.uint8).reshape(chunks, planes, voxels).transpose(1, 0, 2)
    row_of_voxel = join_planes([plane.tobytes() for plane in by_plane])
    if (highest := int(row_of_voxel.max())) >= rows:
        raise DataError(path, f"a voxel has the row {highest} of a table of {rows}", REMEDY)
    return b"".join(encode_rows(table, row_of_voxel, size, np.array(target, np.float32), UNCOMPRESSED))


def _aligned(length: _Length) -> _Length:
    """Return `length` with the padding that follows."""
    return length + -length % _ALIGN
