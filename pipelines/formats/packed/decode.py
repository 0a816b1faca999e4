"""Decoding of packed samples, all or some of their D-slices.

A sample has few distinct voxels: some 40,000 quadruples of counts among two million. It is stored as
the table of them, the most frequent first, and for each voxel its row: as a symbol, a byte, for the first
255 rows, and beyond that as an escape. Symbols and escapes are cut into chunks that inflate separately.
docs/packed.md has the layout byte by byte, and its reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.formats.packed import version2
from pipelines.formats.packed.codecs import REMEDY, inflate
from pipelines.formats.packed.gather_cpu import ESCAPE, gather_rows, join_planes
from pipelines.formats.packed.header import (
    BYTE_SUM_MODULUS,
    SYMBOLS,
    VERSION,
    Chunks,
    Header,
    read_header,
    read_table,
    read_version,
)
from pipelines.io import map_file
from pipelines.sample import UNKNOWN_TARGET, SampleSpec, check_target

_DECODE_VOXELS = 1 << 18
"""Voxels decoded at a time: few enough for a cache, and enough to keep Python's overhead small."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedSample:
    """A packed sample with its header parsed and checked, its chunks still compressed.

    Attributes:
        path: file that errors name.
        content: all bytes; of `read_slices` also those after it in the file.
        table: (rows, C) int16, the distinct voxels.
        target: (4,) float32.
        chunks: all chunks, or consecutive ones.
    """

    path: Path
    content: memoryview
    header: Header
    table: npt.NDArray[np.int16]
    target: npt.NDArray[np.float32]
    chunks: Chunks

    def decode(self) -> npt.NDArray[np.int16]:
        """Decode and fully validate the counts, (D, H, W, C); DataError if they are damaged."""
        self.verify_checksum()
        self.verify_chunks()
        counts = np.empty(self.header.spec.shape, np.int16)
        self.fill(counts, self.table)
        symbols = np.frombuffer(self.symbols(self.chunks), np.uint8)
        if int(symbols.sum(dtype=np.uint64)) % BYTE_SUM_MODULUS != self.header.byte_sum:
            raise DataError(self.path, "its chunks inflate to other symbols than were packed", REMEDY)
        starts = np.cumsum(self.chunks.voxels) - self.chunks.voxels
        escaped = np.add.reduceat(symbols == ESCAPE, starts, dtype=np.int64)
        if self.header.rows > SYMBOLS and (escaped != self.chunks.escapes).any():
            # Those of all chunks are as many as their symbols, but slices of the sample would be wrong.
            raise DataError(self.path, "a chunk has the escapes of another one", REMEDY)
        return counts

    def fill(self, out: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Write `values[row]` of each voxel into `out`.

        Thread-safe; the GIL is released most of the time.

        Args:
            out: (..., C), the voxels of `chunks`, contiguous, of the dtype of `values`.
            values: (rows, C), contiguous: the table, or a function of it.

        Raises:
            DataError: a chunk does not inflate, or has a row beyond the table.
        """
        voxels, planes = out.reshape(-1, values.shape[1]), self.escapes()
        escapes = join_planes(planes) if planes else None
        step = max(1, _DECODE_VOXELS // self.header.chunk_voxels)
        voxel = escape = 0
        for first in range(0, len(self.chunks), step):
            chunks = self.chunks[first : first + step]
            symbols, count = self.symbols(chunks), int(chunks.escapes.sum())
            part = voxels[voxel : voxel + len(symbols)]
            fault = gather_rows(
                symbols, None if escapes is None else escapes[escape : escape + count], values, part
            )
            if fault:
                raise DataError(self.path, f"{fault} in {chunks}", REMEDY)
            voxel, escape = voxel + len(symbols), escape + count

    def symbols(self, chunks: Chunks) -> bytes:
        """Inflate the symbols of `chunks`: a byte for each of their voxels."""
        return self._inflate(chunks, 0, chunks.voxels)

    def escapes(self) -> list[bytes]:
        """Inflate the byte planes of the escapes, the lowest first; none if a symbol can number every row."""
        planes = range(1, self.chunks.sizes.shape[1])
        return [self._inflate(self.chunks, plane, self.chunks.escapes) for plane in planes]

    def verify_checksum(self) -> None:
        """Compare the checksum of all chunks, without inflating them; DataError if they are damaged."""
        if crc32c.crc32c(self.content[self.chunks.extent]) != self.header.chunks_crc:
            self.verify_chunks()
            raise DataError(self.path, "the CRC of its chunks is wrong", REMEDY)

    def verify_chunks(self) -> None:
        """Compare the checksum of each of `chunks`; all of them must be in `content`."""
        for number in range(len(self.chunks)):
            chunk = self.chunks[number : number + 1]
            if crc32c.crc32c(self.content[chunk.extent]) != chunk.crcs[0]:
                raise DataError(self.path, f"the CRC of {chunk} is wrong", REMEDY)

    def _inflate(self, chunks: Chunks, plane: int, lengths: npt.NDArray[np.int64]) -> bytes:
        kind = f"escapes (byte {plane - 1})" if plane else "symbols"
        codec, extents = self.header.codecs[1 + plane], (chunks.starts[:, plane], chunks.sizes[:, plane])
        return inflate(self.path, codec, self.content, *extents, lengths, f"the {kind} of {chunks}")


def open_packed(
    path: Path,
    content: bytes | memoryview,
    spec: SampleSpec | None = None,
    *,
    in_shard: bool = False,
    labeled: bool = True,
) -> PackedSample:
    """Parse the header and the table of the packed sample `content`.

    Args:
        path: file that errors name.
        spec: expected shape; None accepts any.
        in_shard: accept content with more bytes than the sample's, and with chunks missing.
        labeled: False to ignore the target; see `Format.parse`.

    Raises:
        DataError: anything but a chunk is damaged.
    """
    view = memoryview(content)
    version = read_version(path, view)
    if version == version2.VERSION:
        view = memoryview(version2.upgrade(path, view, exact=not in_shard))
    elif version != VERSION:
        fault = f"is a packed sample of version {version}, not {version2.VERSION} or {VERSION}"
        raise DataError(path, fault, REMEDY)
    header, chunks = read_header(path, view)
    if spec is not None and header.spec != spec:
        fault = f"counts have shape {header.spec.shape}"
        raise DataError(path, fault, f"the other samples have {spec.shape}: remove it")
    end = chunks.extent.stop
    if len(view) != end and not in_shard:
        raise DataError(path, f"has {len(view)} bytes; its chunks end at {end}", REMEDY)
    block = view[header.table_start : header.chunks_start]
    table = read_table(path, block, header.codecs[0], header.rows, header.spec.channels)
    target = check_target(path, header.target) if labeled else UNKNOWN_TARGET
    return PackedSample(path, view, header, table, target, chunks)


def read_slices(path: Path, first: int, stop: int, offset: int = 0) -> npt.NDArray[np.int16]:
    """Read the D-slices `first` to `stop` of a packed sample, (stop - first, H, W, C).

    Only the header, the table and the chunks with these slices are accessed.

    Args:
        path: file with the sample, such as a shard.
        offset: position of the sample in the file.

    Raises:
        DataError: what is read is damaged, or there are no such slices.
    """
    packed = open_packed(path, memoryview(map_file(path))[offset:], in_shard=True)
    header = packed.header
    if not 0 <= first < stop <= header.spec.size:
        raise DataError(path, f"has no D-slices {first} to {stop}", f"it has {header.spec.size}")
    slice_voxels, length = header.spec.size**2, header.chunk_voxels
    start, end = first * slice_voxels, stop * slice_voxels
    part = replace(packed, chunks=packed.chunks[start // length : -(-end // length)])
    part.verify_chunks()
    voxels = np.empty((int(part.chunks.voxels.sum()), header.spec.channels), np.int16)
    part.fill(voxels, part.table)
    start -= part.chunks.first * length
    return voxels[start:][: (stop - first) * slice_voxels].reshape(-1, *header.spec.shape[1:])
