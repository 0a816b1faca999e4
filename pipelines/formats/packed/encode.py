"""Encoding of packed samples: counts to a table, symbols and escapes, compressed; `decode` is the inverse."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

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

Block: TypeAlias = bytes | memoryview
"""Consecutive bytes of a packed sample."""


class Compressor(NamedTuple):
    """A codec, and a function that makes its blocks."""

    codec: Codec
    compress: Callable[[Block], bytes]


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
    """Encode `sample`, yielding the bytes in pieces; its counts are not needed from the first piece on.

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
    bounds = [*range(0, voxels, step), voxels]
    symbols, escapes = np.empty(voxels, np.uint8), []
    # Chunk by chunk, as an index of all escapes would be larger than the symbols.
    for first, stop in itertools.pairwise(bounds):
        piece = rows[first:stop]
        np.minimum(piece, ESCAPE, out=symbols[first:stop], casting="unsafe")
        escaped = piece[piece >= ESCAPE] if len(table) > SYMBOLS else piece[:0]
        escapes.append((escaped - ESCAPE).astype("<u4").view(np.uint8).reshape(-1, 4))
    table_planes = table.astype("<i2").view(np.uint8).reshape(*table.shape, 2).transpose(2, 1, 0)
    rest = preset.rest()
    planes = [
        _compress(rest, [table_planes.tobytes()]),
        _compress(preset.symbols(), [symbols[first:stop].data for first, stop in itertools.pairwise(bounds)]),
    ]
    planes += [
        _compress(rest, [escaped[:, plane].tobytes() for escaped in escapes])
        for plane in range(escape_planes(len(table)))
    ]
    codecs, ((table_block,), *columns) = zip(*planes, strict=True)
    chunks = list(zip(*columns, strict=True))
    crcs, lengths = map(_checksum, chunks), [list(map(len, blocks)) for blocks in columns]
    directory = np.array([list(crcs), list(map(len, escapes)), *lengths], "<u4").T
    chunks_crc = _checksum(itertools.chain.from_iterable(chunks))
    byte_sum = int(symbols.sum(dtype=np.uint64)) % BYTE_SUM_MODULUS
    spec = SampleSpec(size, table.shape[1])
    yield pack_header(spec, step, len(table), codecs, target, directory, table_block, chunks_crc, byte_sum)
    yield from map(b"".join, chunks)


def _checksum(blocks: Iterable[Block]) -> int:
    """Return the CRC-32C of `blocks` one after the other."""
    crc = 0
    for block in blocks:
        crc = crc32c.crc32c(block, crc)
    return crc


def _compress(compressor: Compressor, pieces: Sequence[Block]) -> tuple[Codec, Sequence[Block]]:
    """Compress each of `pieces` that has any bytes; leave them as they are if that is shorter."""
    blocks = [compressor.compress(piece) if piece else b"" for piece in pieces]
    shorter = sum(map(len, blocks)) < sum(map(len, pieces))
    return (compressor.codec, blocks) if shorter else (Codec.STORED, pieces)
