"""Decoding of packed samples, all or some of their D-slices.

A sample has few distinct voxels: some 40,000 quadruples of counts among two million. It is stored as
the table of them, the most frequent first, and each voxel's row index; the indices as byte planes (all
low bytes, all second bytes, ...), cut into chunks of whole D-slices, each a separate LZ4 block.
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
from pipelines.formats.packed.gather_cpu import gather_rows
from pipelines.formats.packed.header import BYTE_SUM_MODULUS, Header, aligned, read_directory, read_header
from pipelines.formats.packed.lz4 import FRAME_BLOCK_BYTES, REMEDY, inflate, inflate_many
from pipelines.io import map_file
from pipelines.sample import UNKNOWN_TARGET, SampleSpec, check_target

DECODE_CHUNK_VOXELS = 1 << 18
"""Voxels decoded at a time: few enough for a cache, and enough to keep Python's overhead small."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedSample:
    """A packed sample with its header parsed and checked, its chunks still compressed.

    Attributes:
        path: file that errors name.
        content: all bytes; of `read_slices` also those after it in the file.
        table: (rows, C) int16, the distinct voxels.
        target: (4,) float32.
        starts, sizes, crcs: (chunks, planes) int64. Of each LZ4 block, its offset in `content`, its
            length without padding, and its CRC-32C with padding.
    """

    path: Path
    content: memoryview
    header: Header
    table: npt.NDArray[np.int16]
    target: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    crcs: npt.NDArray[np.int64]

    def decode(self) -> npt.NDArray[np.int16]:
        """Decode and fully validate the counts, (D, H, W, C); DataError if they are damaged."""
        self.verify_checksum()
        counts = np.empty(self.header.spec.shape, np.int16)
        self.fill(counts, self.table)
        inflated = (self._inflate(chunk, plane) for chunk, plane in np.ndindex(self.sizes.shape))
        byte_sum = sum(int(np.frombuffer(block, np.uint8).sum(dtype=np.uint64)) for block in inflated)
        if byte_sum % BYTE_SUM_MODULUS != self.header.byte_sum:
            raise DataError(self.path, "its chunks inflate to other bytes than were packed", REMEDY)
        return counts

    def fill(self, out: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Write `values[row]` of each voxel into `out`.

        Thread-safe; the GIL is released most of the time.

        Args:
            out: (D, H, W, C), contiguous, of the dtype of `values`.
            values: (rows, C), contiguous: the table, or a function of it.

        Raises:
            DataError: a chunk does not inflate, or has a row index beyond the table.
        """
        voxels, chunk_voxels = out.reshape(-1, values.shape[1]), self.header.chunk_voxels
        step = max(1, DECODE_CHUNK_VOXELS // chunk_voxels)
        for first in range(0, len(self.starts), step):
            chunks = range(first, min(first + step, len(self.starts)))
            planes = [self._inflate_plane(chunks, plane) for plane in range(self.header.planes)]
            invalid = gather_rows(planes, values, voxels[first * chunk_voxels : chunks.stop * chunk_voxels])
            if invalid is not None:
                voxel, row = invalid
                fault = f"chunk {chunks[voxel // chunk_voxels]} has the row {row} of a table of {len(values)}"
                raise DataError(self.path, fault, REMEDY)

    def verify_checksum(self) -> None:
        """Compare the checksum of all chunks, without inflating them; DataError if they are damaged."""
        if crc32c.crc32c(self.content[int(self.starts[0, 0]) :]) != self.header.chunks_crc:
            self.verify_chunks()
            raise DataError(self.path, "the CRC of its chunks is wrong", REMEDY)

    def verify_chunks(self) -> None:
        """Compare each chunk's own checksums; all of them must be in `content`."""
        for chunk, plane in np.ndindex(self.crcs.shape):
            start = int(self.starts[chunk, plane])
            padded_block = self.content[start : start + aligned(int(self.sizes[chunk, plane]))]
            if crc32c.crc32c(padded_block) != self.crcs[chunk, plane]:
                raise DataError(self.path, f"the CRC of plane {plane} of chunk {chunk} is wrong", REMEDY)

    def _inflate_plane(self, chunks: range, plane: int) -> bytes:
        """Inflate one byte plane of each of `chunks` and concatenate them."""
        if self.header.chunk_voxels == FRAME_BLOCK_BYTES:
            inflated = inflate_many([self._block(chunk, plane) for chunk in chunks])
            if inflated is not None:
                return inflated
        return b"".join([self._inflate(chunk, plane) for chunk in chunks])

    def _inflate(self, chunk: int, plane: int) -> bytes:
        """Inflate one byte plane of one chunk: a byte for each of its voxels."""
        name = f"plane {plane} of chunk {chunk}"
        return inflate(self.path, self._block(chunk, plane), self.header.chunk_voxels, name)

    def _block(self, chunk: int, plane: int) -> memoryview:
        start = int(self.starts[chunk, plane])
        return self.content[start : start + int(self.sizes[chunk, plane])]


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
    header = read_header(path, view)
    if spec is not None and header.spec != spec:
        fault = f"counts have shape {header.spec.shape}"
        raise DataError(path, fault, f"the other samples have {spec.shape}: remove it")
    directory = read_directory(path, view, header)
    sizes, crcs = directory["bytes"].astype(np.int64), directory["crc32c"].astype(np.int64)
    ends = header.chunks_start + np.cumsum(aligned(sizes))
    if len(view) != ends[-1] and not in_shard:
        raise DataError(path, f"has {len(view)} bytes; its chunks end at {ends[-1]}", REMEDY)
    starts = np.concatenate([[header.chunks_start], ends[:-1]]).reshape(sizes.shape)
    table = _read_table(path, view, header)
    target = check_target(path, header.target) if labeled else UNKNOWN_TARGET
    return PackedSample(path, view, header, table, target, starts, sizes, crcs)


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
    chunks = slice(first // header.slices, -(-stop // header.slices))
    starts, sizes, crcs = (blocks[chunks] for blocks in (packed.starts, packed.sizes, packed.crcs))
    part = replace(packed, starts=starts, sizes=sizes, crcs=crcs)
    part.verify_chunks()
    counts = np.empty((len(part.starts) * header.slices, *header.spec.shape[1:]), np.int16)
    part.fill(counts, part.table)
    skipped = chunks.start * header.slices
    return counts[first - skipped : stop - skipped]


def _read_table(path: Path, content: memoryview, header: Header) -> npt.NDArray[np.int16]:
    start, channels = header.table_start, header.spec.channels
    block = content[start : start + header.table_bytes]
    inflated = inflate(path, block, header.rows * channels * 2, "its table")
    planes = np.frombuffer(inflated, np.uint8).reshape(2, channels, header.rows)
    counts = np.left_shift(planes[1], 8, dtype=np.uint16)
    counts |= planes[0]
    table = np.empty((header.rows, channels), np.int16)
    for channel in range(channels):
        # Copying one column at a time is five times as fast as transposing.
        table[:, channel] = counts[channel].view(np.int16)
    lowest = int(table.min())
    if lowest < 0:
        raise DataError(path, f"a count is {lowest}", "counts start at 0: regenerate the file")
    return table
