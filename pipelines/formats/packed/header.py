"""The header and the directory of a packed sample; docs/packed.md has the layout."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.formats.packed.lz4 import REMEDY
from pipelines.sample import SampleSpec

HEADER = struct.Struct("<8s7I4fIII")
_VERSION = 2
_MAGIC = b"CFPACKED"
_CRC_OFFSET = 56
"""Position of the header's own CRC, which covers everything around it up to the first chunk."""

BYTE_SUM_MODULUS = 1 << 32
"""Modulus of the sum of all inflated bytes."""

BLOCK_ENTRY = np.dtype([("bytes", "<u4"), ("crc32c", "<u4")])
_ALIGN = 16
_MAX_PLANES = 4
_MAX_LZ4_RATIO = 255
"""The most that LZ4 compresses, which bounds the memory that a damaged header can ask for."""

_Length = TypeVar("_Length", int, npt.NDArray[np.int64])


class Header(NamedTuple):
    """The fields of a header.

    Attributes:
        spec: shape of the sample.
        slices: D-slices in a chunk.
        planes: bytes of a row index, each stored in a separate plane.
        rows: rows of the table.
        table_bytes: length of the compressed table.
        target: (4,) float32.
        chunks_crc: CRC-32C of all chunks together.
        crc: CRC-32C of the header, the directory and the table.
        byte_sum: sum of all inflated bytes of the chunks, modulo BYTE_SUM_MODULUS.
    """

    spec: SampleSpec
    slices: int
    planes: int
    rows: int
    table_bytes: int
    target: npt.NDArray[np.float32]
    chunks_crc: int
    crc: int
    byte_sum: int

    @property
    def blocks(self) -> int:
        """Number of LZ4 blocks after the table."""
        return self.spec.size // self.slices * self.planes

    @property
    def chunk_voxels(self) -> int:
        """Voxels of a chunk."""
        return self.slices * self.spec.size**2

    @property
    def table_start(self) -> int:
        """Offset of the table's block."""
        return aligned(HEADER.size + self.blocks * BLOCK_ENTRY.itemsize)

    @property
    def chunks_start(self) -> int:
        """Offset of the first chunk."""
        return aligned(self.table_start + self.table_bytes)

    def pack(self, directory: npt.NDArray[Any], table: bytes) -> bytes:
        """Return the bytes before the first chunk; `crc` is computed.

        Args:
            directory: (blocks,) BLOCK_ENTRY.
            table: the compressed table.
        """
        numbers = (self.spec.size, self.spec.channels, self.slices, self.planes, self.rows, self.table_bytes)
        sums = (self.chunks_crc, 0, self.byte_sum)
        fields = HEADER.pack(_MAGIC, _VERSION, *numbers, *self.target.tolist(), *sums)
        rest = fields[_CRC_OFFSET + 4 :] + padded(directory.tobytes()) + padded(table)
        crc = crc32c.crc32c(rest, crc32c.crc32c(fields[:_CRC_OFFSET]))
        return fields[:_CRC_OFFSET] + struct.pack("<I", crc) + rest


def read_header(path: Path, content: memoryview) -> Header:
    """Parse the header at the start of `content`; DataError if it is not one of this version."""
    if bytes(content[:8]) != _MAGIC[: len(content)] or not content:
        raise DataError(path, "is not a packed sample", REMEDY)
    if len(content) >= 12 and (version := struct.unpack_from("<I", content, 8)[0]) != _VERSION:
        raise DataError(path, f"is a packed sample of version {version}, not {_VERSION}", REMEDY)
    if len(content) < HEADER.size:
        raise DataError(path, f"is cut off after {len(content)} bytes", REMEDY)
    _, _, *numbers, chunks_crc, crc, byte_sum = HEADER.unpack_from(content)
    size, channels, slices, planes, rows, table_bytes, *target = numbers
    valid = (
        0 < size < 1 << 16
        and 0 < channels < 1 << 8
        and 0 < slices <= size
        and size % slices == 0
        and 0 < planes <= _MAX_PLANES
        and 0 < rows <= min(size**3, 1 << 8 * planes)
        and rows * channels * 2 <= table_bytes * _MAX_LZ4_RATIO
    )
    if not valid:
        raise DataError(path, f"its header is not valid ({numbers[:6]})", REMEDY)
    spec, floats = SampleSpec(size, channels), np.array(target, np.float32)
    return Header(spec, slices, planes, rows, table_bytes, floats, chunks_crc, crc, byte_sum)


def read_directory(path: Path, content: memoryview, header: Header) -> npt.NDArray[Any]:
    """Return the directory of the LZ4 blocks, (chunks, planes) BLOCK_ENTRY.

    Raises:
        DataError: `content` is damaged before the first chunk, or a block cannot have its inflated length.
    """
    if len(content) < header.chunks_start:
        fault = f"is cut off: {len(content)} bytes, and its chunks start at {header.chunks_start}"
        raise DataError(path, fault, REMEDY)
    crc = crc32c.crc32c(content[:_CRC_OFFSET])
    if crc32c.crc32c(content[_CRC_OFFSET + 4 : header.chunks_start], crc) != header.crc:
        raise DataError(path, "the CRC of its header is wrong", REMEDY)
    directory = np.frombuffer(content, BLOCK_ENTRY, header.blocks, HEADER.size)
    if (directory["bytes"].astype(np.int64) * _MAX_LZ4_RATIO < header.chunk_voxels).any():
        raise DataError(path, "a chunk is too short for its inflated length", REMEDY)
    return directory.reshape(-1, header.planes)


def padded(content: bytes) -> bytes:
    """Return `content`, padded with zeros to the alignment."""
    return content + bytes(-len(content) % _ALIGN)


def aligned(length: _Length) -> _Length:
    """Return `length` with the padding that follows."""
    return length + -length % _ALIGN
