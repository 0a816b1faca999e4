"""A second reader and writer of packed samples, written from docs/packed.md alone."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import crc32c
import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard
from helpers import tiny_sample

from pipelines.sample import Sample

STORED, LZ4, ZSTD = 0, 1, 2

Rows = Sequence[Sequence[int]] | Sequence[npt.NDArray[np.int64]]


def lz4_inflate(block: bytes) -> bytes:
    """Inflate a raw LZ4 block, by the format's description (lz4_Block_format.md)."""
    out, at = bytearray(), 0
    while True:
        token = block[at]
        at += 1
        literals, match = token >> 4, token & 15
        if literals == 15:
            while True:
                literals += block[at]
                at += 1
                if block[at - 1] != 255:
                    break
        out += block[at : at + literals]
        at += literals
        if at == len(block):
            return bytes(out)
        offset = block[at] | block[at + 1] << 8
        at += 2
        if match == 15:
            while True:
                match += block[at]
                at += 1
                if block[at - 1] != 255:
                    break
        for _ in range(match + 4):
            # The format forbids an offset of 0, for which the LZ4 library writes zeros.
            out.append(out[-offset] if offset else 0)


def lz4_stored(content: bytes) -> bytes:
    """Return `content` as an LZ4 block of one literal."""
    length = len(content)
    if length < 15:
        return bytes([length << 4]) + content
    more, last = divmod(length - 15, 255)
    return b"\xf0" + b"\xff" * more + bytes([last]) + content


def zstd_inflate(frame: bytes, limit: int = 1 << 26) -> bytes:
    """Inflate the Zstandard frame at the start of `frame`, of at most `limit` bytes."""
    assert zstandard.frame_content_size(frame) <= limit
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=limit)


def inflate(codec: int, block: bytes, length: int) -> npt.NDArray[np.uint8]:
    """Return the `length` bytes that `block` inflates to."""
    if length == 0:
        assert block == b""
        return np.empty(0, np.uint8)
    content = lz4_inflate(block) if codec == LZ4 else zstd_inflate(block) if codec == ZSTD else block
    assert len(content) == length
    return np.frombuffer(content, np.uint8)


def deflate(codec: int, content: bytes) -> bytes:
    """Return `content` as a block of `codec`; as it is if there is no such codec."""
    if not content:
        return b""
    if codec == LZ4:
        return lz4.block.compress(content, store_size=False)
    return zstandard.compress(content) if codec == ZSTD else content


def planes_of(table_rows: int) -> int:
    """Return P, the number of byte planes of a sample with a table of `table_rows` rows."""
    return 1 if table_rows <= 256 else 1 + -(-(table_rows - 256).bit_length() // 8)


def read(content: bytes) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
    """Return (counts, target) of the packed sample `content`."""
    magic, version, n, c, v, r, t = struct.unpack_from("<8s6I", content)
    codecs, target = content[32:40], np.frombuffer(content, "<f4", 4, 40)
    chunks_crc, header_crc, symbol_sum = struct.unpack_from("<3I", content, 56)
    assert (magic, version) == (b"CFPACKED", 3)
    assert 0 < n < 65536 and 0 < c < 256 and 0 < v <= min(n**3, 1 << 20) and 0 < r <= n**3
    planes = planes_of(r)
    assert max(codecs) <= 2 and not any(codecs[1 + planes :])
    directory = np.frombuffer(content, "<u4", -(-(n**3) // v) * (2 + planes), 68).reshape(-1, 2 + planes)
    at = 68 + directory.nbytes
    raw = inflate(codecs[0], content[at : at + t], 2 * c * r).reshape(2, c, r).astype(np.int64)
    table, at = (raw[0] + 256 * raw[1]).T, at + t
    assert table.max() < 32768 and np.isfinite(target).all()
    assert chunks_crc == crc32c.crc32c(content[at:])
    assert header_crc == crc32c.crc32c(content[:60] + content[64:at])
    counts, total, voxels = np.empty((n**3, c), np.int16), 0, 0
    for crc, escapes, *lengths in directory.tolist():
        assert crc == crc32c.crc32c(content[at : at + sum(lengths)])
        numbers = np.zeros(escapes, np.int64)
        for plane, length in enumerate(lengths):
            inflated = min(v, n**3 - voxels) if plane == 0 else escapes
            block = inflate(codecs[1 + plane], content[at : at + length], inflated).astype(np.int64)
            at += length
            if plane == 0:
                rows = block
                total += int(block.sum())
            else:
                numbers |= block << 8 * (plane - 1)
        if planes == 1:
            assert escapes == 0
        else:
            assert escapes == (rows == 255).sum()
            rows[rows == 255] = 255 + numbers
        assert rows.max() < r
        counts[voxels : voxels + len(rows)] = table[rows]
        voxels += len(rows)
    assert at == len(content) and symbol_sum == total % 2**32
    return counts.reshape(n, n, n, c), target


def write(
    table: Sequence[Sequence[int]] | npt.NDArray[np.int16],
    rows: Rows,
    *,
    size: int,
    escapes: Rows | None = None,
    codecs: Sequence[int] = (STORED,) * 8,
    target: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4),
    symbol_sum: int | None = None,
    chunks_crc: int | None = None,
    table_block: bytes | None = None,
    blocks: Mapping[tuple[int, int], bytes] | None = None,
    directory: Mapping[tuple[int, int], int] | None = None,
    tail: bytes = b"",
    **fields: int,
) -> bytes:
    """Return a packed sample with a chunk for each of `rows`, and with checksums of what it has.

    Args:
        rows: rows of the voxels of each chunk; their symbols if `escapes` is given.
        escapes: escapes of each chunk.
        codecs: of the table, of the symbols, of each byte plane of the escapes. Padded with zeros.
        symbol_sum, chunks_crc: the sums to state in the header; default the correct ones.
        table_block: block to write for the table.
        blocks: blocks to write for (chunk, plane).
        directory: what to write at (chunk, column) of the directory.
        tail: appended after the last block, and covered by the checksum of the chunks.
        fields: what to write for version, n, C, v, R and T.
    """
    codecs = (*codecs, *(0,) * (8 - len(codecs)))
    rows = [np.asarray(chunk, np.int64) for chunk in rows]
    planes = planes_of(len(table))
    if escapes is None:
        escapes = [chunk[chunk >= 255] - 255 if planes > 1 else chunk[:0] for chunk in rows]
        rows = [np.minimum(chunk, 255) for chunk in rows]
    symbols = [chunk.astype(np.uint8) for chunk in rows]
    raw = np.array(table, np.int64).T
    low_and_high = np.stack([raw & 255, raw >> 8 & 255]).astype(np.uint8)
    if table_block is None:
        table_block = deflate(codecs[0], low_and_high.tobytes())
    listed, content = [], b""
    for chunk, (of_chunk, numbers) in enumerate(zip(symbols, escapes, strict=True)):
        numbers = np.asarray(numbers, np.int64)
        contents = [of_chunk, *((numbers >> 8 * plane & 255).astype(np.uint8) for plane in range(planes - 1))]
        made = [deflate(codecs[1 + plane], each.tobytes()) for plane, each in enumerate(contents)]
        made = [(blocks or {}).get((chunk, plane), block) for plane, block in enumerate(made)]
        joined = b"".join(made)
        listed.append([crc32c.crc32c(joined), len(numbers), *map(len, made)])
        content += joined
    for (chunk, column), value in (directory or {}).items():
        listed[chunk][column] = value
    content += tail
    stated = {
        "version": 3,
        "n": size,
        "C": len(raw),
        "v": len(rows[0]),
        "R": len(table),
        "T": len(table_block),
    }
    header = struct.pack("<8s6I8B", b"CFPACKED", *(stated | fields).values(), *codecs)
    header += struct.pack("<4fI", *target, crc32c.crc32c(content) if chunks_crc is None else chunks_crc)
    total = sum(int(chunk.sum()) for chunk in rows) if symbol_sum is None else symbol_sum
    rest = struct.pack("<I", total % 2**32) + np.array(listed, "<u4").tobytes() + table_block
    return header + struct.pack("<I", crc32c.crc32c(header + rest)) + rest + content


def padded(content: bytes) -> bytes:
    """Return `content`, padded with zeros to a multiple of 16, as version 2 stores it."""
    return content + bytes(-len(content) % 16)


def write_version_2(
    table: Sequence[Sequence[int]],
    rows: Rows,
    *,
    size: int,
    planes: int = 1,
    slices: int | None = None,
    version: int = 2,
    target: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4),
    lengthen: bytes = b"",
    byte_sum: int | None = None,
) -> bytes:
    """Return a packed sample of version 2 with a chunk of `planes` byte planes for each of `rows`.

    Args:
        slices: D-slices of a chunk to state in the header; default the correct number.
        lengthen: bytes appended to the last block.
        byte_sum: sum of all inflated bytes to state in the header; default the correct one.
    """
    raw = np.array(table, np.int64).T
    table_block = lz4_stored(np.stack([raw & 255, raw >> 8 & 255]).astype(np.uint8).tobytes())
    contents = [
        (np.asarray(chunk, np.int64) >> 8 * plane & 255).astype(np.uint8).tobytes()
        for chunk in rows
        for plane in range(planes)
    ]
    contents[-1] += lengthen
    blocks = [lz4_stored(each) for each in contents]
    fields = (
        b"CFPACKED",
        version,
        size,
        len(raw),
        slices or size // len(rows),
        planes,
        len(table),
        len(table_block),
    )
    content = b"".join(map(padded, blocks))
    header = struct.pack("<8s7I4fI", *fields, *target, crc32c.crc32c(content))
    directory = b"".join(struct.pack("<II", len(block), crc32c.crc32c(padded(block))) for block in blocks)
    byte_sum = sum(map(sum, contents)) if byte_sum is None else byte_sum
    rest = struct.pack("<I", byte_sum) + padded(directory) + padded(table_block)
    return header + struct.pack("<I", crc32c.crc32c(header + rest)) + rest + content


TABLE = [[0, 0, 0, 0], [1, 2, 3, 32767], [5, 6, 7, 8]]


def samples() -> dict[str, Sample]:
    """Return samples without escapes and with one and two bytes of them, and with the extremes of counts."""
    rng = np.random.default_rng(3)
    target = np.array([-1, 1, 0.5, 0], np.float32)

    def repeated(distinct: int) -> Sample:
        """Return a sample with `distinct` different voxels."""
        numbers = rng.permutation(np.arange(8**3) % distinct)
        return Sample((numbers.reshape(8, 8, 8, 1) * [1, 0, 64, 2]).astype(np.int16), target)

    return {
        "usual": tiny_sample(1, 16),
        "larger": tiny_sample(2, 48),
        "several chunks": tiny_sample(3, 64),
        "sparse": Sample(rng.poisson(0.3, (32, 32, 32, 4)).astype(np.int16), target),
        "one voxel": Sample(np.full((1, 1, 1, 4), 32767, np.int16), target),
        "all equal": Sample(np.zeros((16, 16, 16, 4), np.int16), target),
        "255 different": repeated(255),
        "256 different": repeated(256),
        "257 different": repeated(257),
        "511 different": repeated(511),
        "512 different": repeated(512),
        "all different": Sample(rng.integers(0, 2**15, (48, 48, 48, 4)).astype(np.int16), target),
        "one redshift": Sample(rng.poisson(1, (32, 32, 32, 1)).astype(np.int16), target),
    }
