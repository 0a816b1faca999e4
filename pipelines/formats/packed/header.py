"""The header and the directory of a packed sample; docs/packed.md has the layout byte by byte."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.formats.packed.codecs import MAX_RATIO, REMEDY, Codec, Integers, inflate
from pipelines.formats.packed.gather_cpu import ESCAPE
from pipelines.sample import SampleSpec, check_not_negative
from pipelines.storage.location import Location

VERSION = 3
_FIELDS = struct.Struct("<8s6I8B4f3I")
FIELDS_BYTES = _FIELDS.size
"""Length of the header, without the directory."""

_MAGIC = b"CFPACKED"
_CRC_OFFSET = 60
"""Position of the header's own CRC, which covers everything around it up to the first chunk."""

SYMBOLS = ESCAPE + 1
"""Rows that a symbol can number."""

BYTE_SUM_MODULUS = 1 << 32
"""Modulus of the sum of all symbols."""

_MAX_CHUNK_VOXELS = 1 << 20
"""Of a chunk that is read: a few times what is written."""


class Header(NamedTuple):
    """The fields of a header.

    Attributes:
        spec: shape of the sample.
        chunk_voxels: voxels of each chunk but the last, which may have fewer.
        rows: rows of the table.
        table_bytes: length of the compressed table.
        codecs: codec of the table, of the symbols, and of each byte plane of the escapes.
        target: (4,) float32.
        chunks_crc: CRC-32C of all chunks together.
        crc: CRC-32C of everything around it up to the first chunk.
        byte_sum: sum of all symbols, modulo BYTE_SUM_MODULUS.
        table_start, chunks_start: offsets of the table's block and of the first chunk.
    """

    spec: SampleSpec
    chunk_voxels: int
    rows: int
    table_bytes: int
    codecs: tuple[Codec, ...]
    target: npt.NDArray[np.float32]
    chunks_crc: int
    crc: int
    byte_sum: int
    table_start: int
    chunks_start: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """The directory of chunks whose voxels follow each other, cyclically.

    Attributes:
        numbers: (chunks,) int64, the number of each in the sample.
        starts, sizes: (chunks, planes) int64, offset and length of each block in what was read.
        voxels, escapes: (chunks,) int64, the numbers of each.
        crcs: (chunks,) int64, CRC-32C of the blocks of each.
    """

    numbers: Integers
    starts: Integers
    sizes: Integers
    voxels: Integers
    escapes: Integers
    crcs: Integers

    def __len__(self) -> int:
        return len(self.voxels)

    def __getitem__(self, part: slice | Integers) -> Chunks:
        """Return the chunks at the positions `part`."""
        arrays = self.numbers, self.starts, self.sizes, self.voxels, self.escapes, self.crcs
        return Chunks(*(array[part] for array in arrays))

    def __str__(self) -> str:
        first, last = self.numbers[[0, -1]].tolist()
        return f"chunk {first}" if len(self) == 1 else f"chunks {first} to {last}"

    @property
    def extent(self) -> slice:
        """The bytes from the first to the last of these chunks."""
        return slice(int(self.starts.min()), int((self.starts + self.sizes).max()))


def escape_planes(rows: int) -> int:
    """Return the byte planes of the escapes of a table of `rows`: as many as the highest one needs."""
    return -(-(rows - 1 - ESCAPE).bit_length() // 8) if rows > SYMBOLS else 0


def pack_header(
    sample_spec: SampleSpec,
    chunk_voxels: int,
    rows: int,
    codecs: tuple[Codec, ...],
    target: npt.NDArray[np.float32],
    directory: npt.NDArray[Any],
    table: bytes,
    chunks_crc: int,
    byte_sum: int,
) -> bytes:
    """Return the bytes before the first chunk.

    Args:
        directory: (chunks, 2 + planes) "<u4"; see docs/packed.md.
        table: the compressed table.
    """
    numbers = (sample_spec.size, sample_spec.channels, chunk_voxels, rows, len(table))
    forms = bytes(codecs).ljust(8, b"\0")
    fields = _FIELDS.pack(_MAGIC, VERSION, *numbers, *forms, *target.tolist(), chunks_crc, 0, byte_sum)
    rest = fields[_CRC_OFFSET + 4 :] + directory.tobytes() + table
    crc = crc32c.crc32c(rest, crc32c.crc32c(fields[:_CRC_OFFSET]))
    return fields[:_CRC_OFFSET] + struct.pack("<I", crc) + rest


def read_version(path: Location, content: memoryview) -> int:
    """Return the version of the packed sample `content`; DataError if it is not one."""
    if bytes(content[:8]) != _MAGIC[: len(content)] or not content:
        raise DataError(path, "is not a packed sample", REMEDY)
    if len(content) < 12:
        raise DataError(path, f"is cut off after {len(content)} bytes", REMEDY)
    (version,) = struct.unpack_from("<I", content, 8)
    return int(version)


def read_fields(path: Location, content: memoryview) -> Header:
    """Parse the first FIELDS_BYTES of `content`, without a checksum; DataError if they are not valid."""
    if len(content) < _FIELDS.size:
        raise DataError(path, f"is cut off after {len(content)} bytes", REMEDY)
    fields = _FIELDS.unpack_from(content)
    size, channels, chunk_voxels, rows, table_bytes, *forms = fields[2:15]
    target, (chunks_crc, crc, byte_sum) = fields[15:19], fields[19:]
    planes = 1 + escape_planes(rows)
    codecs = forms[: 1 + planes]
    valid = (
        0 < size < 1 << 16
        and 0 < channels < 1 << 8
        and 0 < chunk_voxels <= min(size**3, _MAX_CHUNK_VOXELS)
        and 0 < rows <= size**3
        and all(form in MAX_RATIO for form in codecs)
        and not any(forms[1 + planes :])
        and rows * channels * 2 <= table_bytes * MAX_RATIO[Codec(codecs[0])]
    )
    if not valid:
        raise DataError(path, f"its header is not valid ({list(fields[2:15])})", REMEDY)
    chunks = -(-(size**3) // chunk_voxels)
    table_start = _FIELDS.size + chunks * (2 + planes) * 4
    spec, floats = SampleSpec(size, channels), np.array(target, np.float32)
    return Header(
        spec, chunk_voxels, rows, table_bytes, tuple(map(Codec, codecs)), floats, chunks_crc, crc, byte_sum,
        table_start, table_start + table_bytes,
    )  # fmt: skip


def read_header(path: Location, content: memoryview) -> tuple[Header, Chunks]:
    """Parse the header and the directory at the start of `content`.

    Raises:
        DataError: `content` is damaged before the table, or a block cannot have its inflated length.
    """
    header = read_fields(path, content)
    chunks_start = header.chunks_start
    if len(content) < chunks_start:
        fault = f"is cut off: {len(content)} bytes, and its chunks start at {chunks_start}"
        raise DataError(path, fault, REMEDY)
    found = crc32c.crc32c(content[_CRC_OFFSET + 4 : chunks_start], crc32c.crc32c(content[:_CRC_OFFSET]))
    if found != header.crc:
        raise DataError(path, "the CRC of its header is wrong", REMEDY)
    planes = len(header.codecs) - 1
    columns = np.frombuffer(content[_FIELDS.size : header.table_start], "<u4").reshape(-1, 2 + planes).T
    crcs, escapes, *lengths = columns.astype(np.int64)
    sizes = np.stack(lengths, 1)
    starts = chunks_start + (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    voxels = np.full(len(crcs), header.chunk_voxels)
    voxels[-1] = header.spec.size**3 - (len(crcs) - 1) * header.chunk_voxels
    inflated = np.stack([voxels, *[escapes] * (planes - 1)], 1)
    ratios = np.array([MAX_RATIO[codec] for codec in header.codecs[1:]])
    if (escapes > (voxels if planes > 1 else 0)).any() or (sizes * ratios < inflated).any():
        raise DataError(path, "a chunk is too short for its inflated length", REMEDY)
    return header, Chunks(np.arange(len(crcs)), starts, sizes, voxels, escapes, crcs)


def read_table(
    path: Location, block: memoryview, codec: Codec, rows: int, channels: int
) -> npt.NDArray[np.int16]:
    """Inflate the table `block`; return the table (rows, C)."""
    start, size, length = (np.array([number]) for number in (0, len(block), rows * channels * 2))
    inflated = inflate(path, codec, block, start, size, length, "the bytes of its table")
    planes = np.frombuffer(inflated, np.uint8).reshape(2, channels, rows)
    counts = np.left_shift(planes[1], 8, dtype=np.uint16)
    counts |= planes[0]
    table = np.empty((rows, channels), np.int16)
    for channel in range(channels):
        # Copying one column at a time is five times as fast as transposing.
        table[:, channel] = counts[channel].view(np.int16)
    check_not_negative(path, table)
    return table
