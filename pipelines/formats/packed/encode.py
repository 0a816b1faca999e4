"""Encoding of packed samples: counts to a table, symbols and escapes, compressed; `decode` is the inverse."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import crc32c
import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard

from pipelines.formats.packed.codecs import Codec
from pipelines.formats.packed.distinct import tabulate
from pipelines.formats.packed.gather_cpu import ESCAPE
from pipelines.formats.packed.header import (
    BYTE_SUM_MODULUS,
    SYMBOLS,
    escape_planes,
    pack_header,
)
from pipelines.sample import Sample, SampleSpec


class Compressor(NamedTuple):
    """A codec, and a function that makes its blocks."""

    codec: Codec
    compress: Callable[[bytes], bytes]


class Preset(NamedTuple):
    """A choice of compressors.

    Attributes:
        chunk_voxels: voxels of a chunk.
        symbols, rest: functions that make the compressors of the symbols, and of the table and the escapes.
            A compressor keeps state between its calls, so that each sample gets its own.
    """

    chunk_voxels: int
    symbols: Callable[[], Compressor]
    rest: Callable[[], Compressor]


def _stored() -> Compressor:
    return Compressor(Codec.STORED, bytes)


def _lz4() -> Compressor:
    # Level 12 saves another 0.1% in half again the time.
    compress = functools.partial(lz4.block.compress, store_size=False, mode="high_compression", compression=9)
    return Compressor(Codec.LZ4, lambda content: bytes(compress(content)))


def _zstd(level: int, **parameters: int) -> Compressor:
    chosen = zstandard.ZstdCompressionParameters.from_level(level, write_checksum=False, **parameters)
    return Compressor(Codec.ZSTD, zstandard.ZstdCompressor(compression_params=chosen).compress)


# Symbols are nearly random: what compresses them is their frequency. Matches of less than 7 bytes cost more
# in either direction than they save.
_fast = functools.partial(
    _zstd, 1, strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=17, min_match=7, target_length=0
)
_small = functools.partial(_zstd, 19, min_match=7, search_log=4, target_length=128)

PRESETS = {
    "lz4": Preset(1 << 14, _lz4, functools.partial(_zstd, 19)),
    "fast": Preset(1 << 16, _fast, functools.partial(_zstd, 1)),
    "small": Preset(1 << 17, _small, functools.partial(_zstd, 19)),
}
"""The presets by name; docs/packed.md has their sizes and times."""

DEFAULT_PRESET = "fast"

UNCOMPRESSED = Preset(1 << 16, _stored, _stored)


def encode(
    sample: Sample, preset: str = DEFAULT_PRESET, *, chunk_voxels: int | None = None
) -> Iterator[bytes]:
    """Encode `sample`, yielding the bytes in pieces.

    Args:
        preset: a key of PRESETS.
        chunk_voxels: voxels of a chunk; the default is that of the preset.
    """
    chosen = PRESETS[preset]
    if chunk_voxels is not None:
        chosen = chosen._replace(chunk_voxels=chunk_voxels)
    return encode_rows(*tabulate(sample.counts), sample.counts.shape[0], sample.target, chosen)


def encode_rows(
    table: npt.NDArray[np.int16],
    rows: npt.NDArray[np.unsignedinteger[Any]],
    size: int,
    target: npt.NDArray[np.float32],
    preset: Preset,
) -> Iterator[bytes]:
    """Encode a sample of `size`^3 that is given by its `table` (rows, C) and the row of each voxel."""
    voxels = size**3
    step = min(preset.chunk_voxels, voxels)
    starts = np.arange(0, voxels, step)
    escaped = np.flatnonzero(rows >= ESCAPE) if len(table) > SYMBOLS else np.empty(0, np.intp)
    symbols = np.minimum(rows, ESCAPE).astype(np.uint8)
    escapes = (rows[escaped] - ESCAPE).astype("<u4").view(np.uint8).reshape(-1, 4).T
    bounds = [*np.searchsorted(escaped, starts).tolist(), len(escaped)]
    table_planes = table.astype("<i2").view(np.uint8).reshape(*table.shape, 2).transpose(2, 1, 0)
    rest = preset.rest()
    planes = [
        _compress(rest, [table_planes.tobytes()]),
        _compress(preset.symbols(), [symbols[start : start + step].tobytes() for start in starts]),
    ]
    for plane in escapes[: escape_planes(len(table))]:
        pieces = [plane[first:stop].tobytes() for first, stop in itertools.pairwise(bounds)]
        planes.append(_compress(rest, pieces))
    codecs, ((table_block,), *columns) = zip(*planes, strict=True)
    chunks = [b"".join(blocks) for blocks in zip(*columns, strict=True)]
    crcs, lengths = map(crc32c.crc32c, chunks), [list(map(len, blocks)) for blocks in columns]
    directory = np.array([list(crcs), np.diff(bounds), *lengths], "<u4").T
    sums = crc32c.crc32c(b"".join(chunks)), int(symbols.sum(dtype=np.uint64)) % BYTE_SUM_MODULUS
    spec = SampleSpec(size, table.shape[1])
    yield pack_header(spec, step, len(table), codecs, target, directory, table_block, *sums)
    yield from chunks


def _compress(compressor: Compressor, pieces: list[bytes]) -> tuple[Codec, list[bytes]]:
    """Compress each of `pieces` that has any bytes; leave them as they are if that is shorter."""
    blocks = [compressor.compress(piece) if piece else b"" for piece in pieces]
    shorter = sum(map(len, blocks)) < sum(map(len, pieces))
    return (compressor.codec, blocks) if shorter else (Codec.STORED, pieces)
