"""One sample in a form that is smaller than gzip, inflates in parallel, and lets a part be read alone.

A sample has few different voxels: some 40,000 quadruples of counts among two million. It is kept as
the table of them, the commonest first, and each voxel's row in it; the rows as byte planes (all low
bytes, all second bytes, ...), cut into chunks of whole D-slices, each an LZ4 block of its own. The
layout, byte by byte, and why, is in docs/packed.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.errors import AccessError, DataError
from pipelines.formats.packed.gather_cpu import gather_rows
from pipelines.formats.packed.header import (
    BYTE_SUM_MODULUS,
    CHECKED,
    ENTRY,
    HEADER,
    MAX_LZ4_RATIO,
    Header,
    aligned,
    read_header,
)
from pipelines.formats.packed.lz4 import FRAME_BLOCK_BYTES, REMEDY, inflate, inflate_many
from pipelines.sample import SampleSpec, check_target

DECODE_CHUNK_VOXELS = 1 << 18
"""Voxels that are decoded at a time: few enough for a cache, and enough that Python costs little."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedSample:
    """A packed sample, its header read and checked, its chunks as they are.

    path: what errors name.
    content: the whole, or its beginning as far as the table, where only some chunks are wanted.
    slices: D-slices in a chunk.
    planes: bytes of a row's number.
    table: (rows, C) int16, the different voxels.
    target: (4,) float32.
    crc: the CRC-32C of all chunks, one after the other.
    total: the sum of the bytes that all chunks inflate to, modulo TOTAL.
    starts, sizes, crcs: (chunks, planes) int64, of each LZ4 block: where it starts in `content`, its
        length without padding, and the CRC-32C of it with padding.
    """

    path: Path
    content: memoryview
    spec: SampleSpec
    slices: int
    planes: int
    table: npt.NDArray[np.int16]
    target: npt.NDArray[np.float32]
    crc: int
    total: int
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    crcs: npt.NDArray[np.int64]

    @property
    def voxels(self) -> int:
        """Of a chunk."""
        return self.slices * self.spec.size**2

    def counts(self) -> npt.NDArray[np.int16]:
        """All of the sample, (D, H, W, C); DataError names whatever is not as it was packed."""
        self.check()
        counts = np.empty(self.spec.shape, np.int16)
        self.fill(counts, self.table)
        inflated = (self._plane(chunk, plane) for chunk, plane in np.ndindex(self.sizes.shape))
        total = sum(int(np.frombuffer(block, np.uint8).sum(dtype=np.uint64)) for block in inflated)
        if total % BYTE_SUM_MODULUS != self.total:
            raise DataError(self.path, "its chunks inflate to other bytes than were packed", REMEDY)
        return counts

    def fill(self, out: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Write `values` (rows, C) of each voxel's row into `out` (D, H, W, C), both contiguous.

        DataError where a chunk cannot be what was packed. Safe in many threads; the GIL is free most
        of the time.
        """
        voxels = out.reshape(-1, values.shape[1])
        together = max(1, DECODE_CHUNK_VOXELS // self.voxels)
        for first in range(0, len(self.starts), together):
            chunks = range(first, min(first + together, len(self.starts)))
            planes = [self._planes(chunks, plane) for plane in range(self.planes)]
            part = voxels[first * self.voxels :][: len(chunks) * self.voxels]
            beyond = gather_rows(planes, values, part)
            if beyond is not None:
                voxel, row = beyond
                fault = f"chunk {chunks[voxel // self.voxels]} has the row {row} of a table of {len(values)}"
                raise DataError(self.path, fault, REMEDY)

    def check(self) -> None:
        """DataError unless all chunks are as they were written: by their checksum, without inflating."""
        if crc32c.crc32c(self.content[int(self.starts[0, 0]) :]) != self.crc:
            self.check_each_chunk()
            raise DataError(self.path, "the CRC of its chunks is wrong", REMEDY)

    def check_each_chunk(self) -> None:
        """The same by each chunk's own checksums, of which none need be missing."""
        for chunk, plane in np.ndindex(self.crcs.shape):
            start, end = self.extent(chunk, plane)
            if crc32c.crc32c(self.content[start:end]) != self.crcs[chunk, plane]:
                raise DataError(self.path, f"the CRC of plane {plane} of chunk {chunk} is wrong", REMEDY)

    def extent(self, chunk: int, plane: int) -> tuple[int, int]:
        """Where in the sample's bytes that block starts and, with its padding, ends."""
        start = int(self.starts[chunk, plane])
        return start, start + aligned(int(self.sizes[chunk, plane]))

    def _planes(self, chunks: range, plane: int) -> bytes:
        """That byte plane of each of `chunks`, one after the other, inflated."""
        if self.voxels == FRAME_BLOCK_BYTES:
            together = inflate_many([self._block(chunk, plane) for chunk in chunks])
            if together is not None:
                return together
        return b"".join([self._plane(chunk, plane) for chunk in chunks])

    def _plane(self, chunk: int, plane: int) -> bytes:
        """That byte plane, inflated: a byte for each voxel of the chunk."""
        name = f"plane {plane} of chunk {chunk}"
        return inflate(self.path, self._block(chunk, plane), self.voxels, name)

    def _block(self, chunk: int, plane: int) -> memoryview:
        start = int(self.starts[chunk, plane])
        return self.content[start : start + int(self.sizes[chunk, plane])]


def open_packed(
    path: Path, content: bytes | memoryview, spec: SampleSpec | None = None, *, beginning: bool = False
) -> PackedSample:
    """The packed sample `content`, of the file at `path`; DataError names any fault but those of chunks.

    beginning: `content` may end behind the table.
    """
    view = memoryview(content)
    header = read_header(path, view)
    if spec is not None and header.spec != spec:
        fault = f"counts have shape {header.spec.shape}"
        raise DataError(path, fault, f"the other samples have {spec.shape}: remove it")
    if len(view) < header.beginning:
        fault = f"is cut off: {len(view)} bytes, and its chunks start at {header.beginning}"
        raise DataError(path, fault, REMEDY)
    checked = crc32c.crc32c(view[:CHECKED])
    if crc32c.crc32c(view[CHECKED + 4 : header.beginning], checked) != header.crc:
        raise DataError(path, "the CRC of its header is wrong", REMEDY)
    entries = np.frombuffer(view, ENTRY, header.blocks, HEADER.size).reshape(-1, header.planes)
    sizes = entries["bytes"].astype(np.int64)
    if (sizes * MAX_LZ4_RATIO < header.slices * header.spec.size**2).any():
        raise DataError(path, "a chunk is too short for what it should become", REMEDY)
    ends = header.beginning + np.cumsum(aligned(sizes))
    if len(view) != ends[-1] and not beginning:
        raise DataError(path, f"has {len(view)} bytes where its chunks end at {ends[-1]}", REMEDY)
    starts = np.concatenate([[header.beginning], ends[:-1]]).reshape(sizes.shape)
    crcs = entries["crc32c"].astype(np.int64)
    table = _table(path, view, header)
    target = check_target(path, header.target)
    return PackedSample(
        path,
        view,
        header.spec,
        header.slices,
        header.planes,
        table,
        target,
        header.crc_of_chunks,
        header.total,
        starts,
        sizes,
        crcs,
    )


def read_slices(path: Path, first: int, stop: int, offset: int = 0) -> npt.NDArray[np.int16]:
    """The D-slices `first` to `stop` of the sample at `offset` of the file `path`: (stop - first, H, W, C).

    Reads no more of it than its header, its table and the chunks that hold them. DataError names any
    fault that this meets, or that there are no such slices.
    """
    with _open(path) as file:

        def read(start: int, length: int) -> memoryview:
            return memoryview(os.pread(file.fileno(), length, offset + start))

        header = read_header(path, read(0, HEADER.size))
        packed = open_packed(path, read(0, header.beginning), beginning=True)
        if not 0 <= first < stop <= header.spec.size:
            fault = f"has no D-slices {first} to {stop}"
            raise DataError(path, fault, f"it has {header.spec.size}")
        chunks = slice(first // header.slices, -(-stop // header.slices))
        start, end = int(packed.starts[chunks][0, 0]), packed.extent(chunks.stop - 1, header.planes - 1)[1]
        part = replace(
            packed,
            content=read(start, end - start),
            starts=packed.starts[chunks] - start,
            sizes=packed.sizes[chunks],
            crcs=packed.crcs[chunks],
        )
    part.check_each_chunk()
    counts = np.empty((len(part.starts) * header.slices, *header.spec.shape[1:]), np.int16)
    part.fill(counts, part.table)
    begin = chunks.start * header.slices
    return counts[first - begin : stop - begin]


def _table(path: Path, content: memoryview, header: Header) -> npt.NDArray[np.int16]:
    start, channels = header.table_start, header.spec.channels
    block = content[start : start + header.table_bytes]
    inflated = inflate(path, block, header.rows * channels * 2, "its table")
    planes = np.frombuffer(inflated, np.uint8).reshape(2, channels, header.rows)
    counts = np.left_shift(planes[1], 8, dtype=np.uint16)
    counts |= planes[0]
    table = np.empty((header.rows, channels), np.int16)
    for channel in range(channels):
        # A column at a time is five times as fast as transposing.
        table[:, channel] = counts[channel].view(np.int16)
    lowest = int(table.min())
    if lowest < 0:
        raise DataError(path, f"a count is {lowest}", "counts start at 0: make the file anew")
    return table


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise AccessError.reading(path, error) from error
