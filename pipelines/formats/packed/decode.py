"""Decoding of packed samples, or of slabs of them.

A sample has few distinct voxels: some 40,000 quadruples of counts among two million. It is stored as
the table of them, the most frequent first, and for each voxel its row: as a symbol, a byte, for the first
255 rows, and beyond that as an escape. Symbols and escapes are cut into chunks that inflate separately.
docs/packed.md has the layout byte by byte, and its reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.errors import ConfigError, DataError
from pipelines.formats.packed import version2
from pipelines.formats.packed.codecs import REMEDY, inflate
from pipelines.formats.packed.gather_cpu import ESCAPE, gather_rows, join_planes
from pipelines.formats.packed.header import (
    BYTE_SUM_MODULUS,
    FIELDS_BYTES,
    SYMBOLS,
    VERSION,
    Chunks,
    Header,
    read_fields,
    read_header,
    read_table,
    read_version,
)
from pipelines.sample import UNKNOWN_TARGET, SampleSpec, check_target
from pipelines.slab import Slab, cyclic_runs, shape_to_read
from pipelines.storage.location import Location

_LONGEST_START: dict[SampleSpec, int] = {}
"""Most bytes before the chunks of the samples that this process has read in part."""

_DECODE_VOXELS = 1 << 18
"""Voxels decoded at a time: few enough for a cache, and enough to keep Python's overhead small."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedSample:
    """A packed sample with its header parsed and checked, its chunks still compressed.

    Attributes:
        path: file that errors name.
        content: all bytes, or the header and the chunks that were read.
        table: (rows, C) int16, the distinct voxels.
        target: (4,) float32.
        chunks: all chunks, or those with voxels of `slab`.
        slab: the planes to decode; None for all.
    """

    path: Location
    content: memoryview
    header: Header
    table: npt.NDArray[np.int16]
    target: npt.NDArray[np.float32]
    chunks: Chunks
    slab: Slab | None = None

    @property
    def window(self) -> tuple[slice, int]:
        """The planes to decode that the chunks hold, and the number of voxels of the chunks before them."""
        size = self.header.spec.size
        if self.slab is None:
            return slice(0, size), 0
        planes, first = self.slab.planes(size)
        return planes, first * size**2 - int(self.chunks.numbers[0]) * self.header.chunk_voxels

    def decode(self) -> npt.NDArray[np.int16]:
        """Decode and fully validate the counts, (D, H, W, C); DataError if they are damaged."""
        self.verify_checksum()
        self.verify_chunks()
        counts = np.empty(shape_to_read(self.header.spec, self.slab), np.int16)
        self.fill(counts, self.table)
        symbols = self.symbols(self.chunks)
        byte_sum = int(np.frombuffer(symbols, np.uint8).sum(dtype=np.uint64)) % BYTE_SUM_MODULUS
        if self.slab is None and byte_sum != self.header.byte_sum:
            raise DataError(self.path, "its chunks inflate to other symbols than were packed", REMEDY)
        ends = np.cumsum(self.chunks.voxels)
        extents = zip((ends - self.chunks.voxels).tolist(), ends.tolist(), strict=True)
        # Not by comparing with NumPy, which takes the memory of another sample.
        escaped = [symbols.count(ESCAPE, start, end) for start, end in extents]
        if self.header.rows > SYMBOLS and escaped != self.chunks.escapes.tolist():
            # Those of all chunks are as many as their symbols, but slabs of the sample would be wrong.
            raise DataError(self.path, "a chunk has the escapes of another one", REMEDY)
        return counts

    def fill(self, out: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Write `values[row]` of each voxel into `out`, and zeros where a slab extends beyond the sample.

        Thread-safe; the GIL is released most of the time.

        Args:
            out: (D, H, W, C), contiguous, of the dtype of `values`.
            values: (rows, C), contiguous: the table, or a function of it.

        Raises:
            DataError: a chunk does not inflate, or has a row beyond the table.
        """
        window, skipped = self.window
        out[: window.start] = out[window.stop :] = 0
        voxels, planes = out[window].reshape(-1, values.shape[1]), self.escapes()
        escapes = join_planes(planes) if planes else None
        step = max(1, _DECODE_VOXELS // self.header.chunk_voxels)
        voxel, escape = -skipped, 0
        for first in range(0, len(self.chunks), step):
            chunks = self.chunks[first : first + step]
            symbols, count = self.symbols(chunks), int(chunks.escapes.sum())
            # The first and the last chunk of a slab may have voxels outside it.
            start, stop = max(0, -voxel), min(len(symbols), len(voxels) - voxel)
            numbers = None
            if escapes is not None:
                before, after = (symbols.count(ESCAPE, *ends) for ends in ((0, start), (stop,)))
                numbers = escapes[escape + before : max(escape + count - after, escape + before)]
            fault = gather_rows(symbols[start:stop], numbers, values, voxels[voxel + start : voxel + stop])
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
        """Compare the checksums of what was read, without inflating it; DataError if it is damaged."""
        if self.slab is not None:
            self.verify_chunks()
        elif crc32c.crc32c(self.content[self.chunks.extent]) != self.header.chunks_crc:
            self.verify_chunks()
            raise DataError(self.path, "the CRC of its chunks is wrong", REMEDY)

    def verify_chunks(self) -> None:
        """Compare the checksum of each of `chunks`; DataError names the first that is damaged."""
        for number in range(len(self.chunks)):
            chunk = self.chunks[number : number + 1]
            if crc32c.crc32c(self.content[chunk.extent]) != chunk.crcs[0]:
                raise DataError(self.path, f"the CRC of {chunk} is wrong", REMEDY)

    def _inflate(self, chunks: Chunks, plane: int, lengths: npt.NDArray[np.int64]) -> bytes:
        kind = f"escapes (byte {plane - 1})" if plane else "symbols"
        codec, extents = self.header.codecs[1 + plane], (chunks.starts[:, plane], chunks.sizes[:, plane])
        return inflate(self.path, codec, self.content, *extents, lengths, f"the {kind} of {chunks}")


def open_packed(
    path: Location, content: bytes | memoryview, spec: SampleSpec | None = None, *, labeled: bool = True
) -> PackedSample:
    """Parse the header and the table of the packed sample `content`.

    Args:
        path: file that errors name.
        spec: expected shape; None accepts any.
        labeled: False to ignore the target; see `Format.parse`.

    Raises:
        DataError: anything but a chunk is damaged.
    """
    view = memoryview(content)
    if _check_version(path, view) == version2.VERSION:
        view = memoryview(version2.upgrade(path, view))
    return _open(path, view, len(view), spec, labeled=labeled)


def open_slab(
    path: Location,
    read: Callable[[int, int], bytes],
    length: int,
    spec: SampleSpec,
    slab: Slab,
    *,
    few_reads: bool = False,
) -> PackedSample:
    """Read the header, the table and the chunks of a packed sample that hold voxels of `slab`.

    Args:
        path: file that errors name.
        read: returns the bytes of the sample at an offset, of a length.
        length: length of the sample in bytes.
        spec: expected shape.
        few_reads: read as much at first as header and table of such samples have had, because a read takes
            longer than some bytes more.

    Raises:
        DataError: anything but a chunk is damaged.
        ConfigError: the sample is of a version of which no part can be read alone.
    """
    usual = _LONGEST_START.get(spec, FIELDS_BYTES) if few_reads else FIELDS_BYTES
    start = read(0, min(usual, length))
    if _check_version(path, memoryview(start)) == version2.VERSION:
        fault = f"{path} is a packed sample of version {version2.VERSION}, of which no part can be read alone"
        advice = "run python -m preprocess.convert -i SRC -o DST --to packed"
        raise ConfigError("parallel.spatial", slab.count, f"{fault}: {advice}")
    end = min(read_fields(path, memoryview(start)).chunks_start, length)
    start = start[:end] if len(start) >= end else start + read(len(start), end - len(start))
    packed = _open(path, memoryview(start), length, spec)
    _LONGEST_START[spec] = max(_LONGEST_START.get(spec, 0), packed.header.chunks_start)
    chunks, planes, plane = packed.chunks, *slab.planes(spec.size)

    def number_of_chunk(voxel: int) -> int:
        around, voxel = divmod(voxel, spec.size**3)
        return around * len(chunks) + voxel // packed.header.chunk_voxels

    first = number_of_chunk(plane * spec.size**2)
    stop = number_of_chunk((plane + planes.stop - planes.start) * spec.size**2 - 1) + 1
    parts, starts = [start], chunks.starts.copy()
    for run in cyclic_runs(first, min(stop - first, len(chunks)), len(chunks)):
        extent = chunks[run.start : run.stop].extent
        starts[run.start : run.stop] += sum(map(len, parts)) - extent.start
        parts.append(read(extent.start, extent.stop - extent.start))
    needed = replace(chunks, starts=starts)[np.arange(first, stop) % len(chunks)]
    return replace(packed, content=memoryview(b"".join(parts)), chunks=needed, slab=slab)


def keep_slab(path: Location, content: bytes, spec: SampleSpec, slab: Slab) -> tuple[bytes, int]:
    """Return the packed sample `content` with zeros for what `open_slab` does not read, and their number.

    Raises:
        DataError, ConfigError: see `open_slab`.
    """
    kept, omitted = bytearray(len(content)), len(content)

    def read(offset: int, length: int) -> bytes:
        nonlocal omitted
        part = content[offset : offset + length]
        kept[offset : offset + length] = part
        omitted -= length
        return part

    open_slab(path, read, len(content), spec, slab)
    return bytes(kept), omitted


def _check_version(path: Location, content: memoryview) -> int:
    """Return the version of the packed sample `content`; DataError if it is not read."""
    version = read_version(path, content)
    if version not in (version2.VERSION, VERSION):
        fault = f"is a packed sample of version {version}, not {version2.VERSION} or {VERSION}"
        raise DataError(path, fault, REMEDY)
    return version


def _open(
    path: Location, content: memoryview, length: int, spec: SampleSpec | None, *, labeled: bool = True
) -> PackedSample:
    """Parse `content`, a packed sample of `length` bytes, or the bytes of it before its first chunk."""
    header, chunks = read_header(path, content)
    if spec is not None and header.spec != spec:
        fault = f"counts have shape {header.spec.shape}"
        raise DataError(path, fault, f"the other samples have {spec.shape}: remove it")
    end = chunks.extent.stop
    if length != end:
        raise DataError(path, f"has {length} bytes; its chunks end at {end}", REMEDY)
    block = content[header.table_start : header.chunks_start]
    table = read_table(path, block, header.codecs[0], header.rows, header.spec.channels)
    target = check_target(path, header.target) if labeled else UNKNOWN_TARGET
    return PackedSample(path, content, header, table, target, chunks)
