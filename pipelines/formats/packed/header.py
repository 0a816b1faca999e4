"""What the first bytes of a packed sample say; docs/packed.md has the layout."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.formats.packed.lz4 import REMEDY
from pipelines.sample import SampleSpec

VERSION = 2
MAGIC = b"CFPACKED"
HEADER = struct.Struct("<8s7I4fIII")
CHECKED = 56
"""Where the CRC of the header stands, and so where what it covers is interrupted."""

BYTE_SUM_MODULUS = 1 << 32
"""The sum of all inflated bytes is kept modulo this."""

ENTRY = np.dtype([("bytes", "<u4"), ("crc32c", "<u4")])
ALIGN = 16
_PLANES = 4
MAX_LZ4_RATIO = 255
"""LZ4 makes at most so many bytes of one, so that what a header asks for is bounded by what is there."""

_Length = TypeVar("_Length", int, npt.NDArray[np.int64])


class Header(NamedTuple):
    """What the first bytes say; `beginning` is how many bytes end with the table."""

    spec: SampleSpec
    slices: int
    planes: int
    rows: int
    table_bytes: int
    target: npt.NDArray[np.float32]
    crc_of_chunks: int
    crc: int
    total: int

    @property
    def blocks(self) -> int:
        """How many LZ4 blocks follow the table."""
        return self.spec.size // self.slices * self.planes

    @property
    def table_start(self) -> int:
        """Where the table's block starts."""
        return aligned(HEADER.size + self.blocks * ENTRY.itemsize)

    @property
    def beginning(self) -> int:
        """Where the first chunk starts."""
        return aligned(self.table_start + self.table_bytes)


def read_header(path: Path, content: memoryview) -> Header:
    """The header at the start of `content`; DataError where it is none of this version."""
    if bytes(content[:8]) != MAGIC[: len(content)] or not content:
        raise DataError(path, "is no packed sample", REMEDY)
    if len(content) >= 12 and (version := struct.unpack_from("<I", content, 8)[0]) != VERSION:
        fault = f"is a packed sample of version {version}"
        raise DataError(path, fault, f"this program reads version {VERSION}: convert the sample again")
    if len(content) < HEADER.size:
        raise DataError(path, f"is cut off after {len(content)} bytes", REMEDY)
    _, _, *numbers, of_chunks, crc, total = HEADER.unpack_from(content)
    size, channels, slices, planes, rows, table_bytes, *target = numbers
    sound = (
        0 < size < 1 << 16
        and 0 < channels < 1 << 8
        and 0 < slices <= size
        and size % slices == 0
        and 0 < planes <= _PLANES
        and 0 < rows <= min(size**3, 1 << 8 * planes)
        and rows * channels * 2 <= table_bytes * MAX_LZ4_RATIO
    )
    if not sound:
        raise DataError(path, f"its header does not make sense ({numbers[:6]})", REMEDY)
    found = np.array(target, np.float32)
    spec = SampleSpec(size, channels)
    return Header(spec, slices, planes, rows, table_bytes, found, of_chunks, crc, total)


def aligned(length: _Length) -> _Length:
    """`length` with the padding that follows."""
    return length + -length % ALIGN
