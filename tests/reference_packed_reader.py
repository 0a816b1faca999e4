"""A second reader and writer of packed samples, written from docs/packed.md alone."""

from __future__ import annotations

import struct

import crc32c
import numpy as np
import numpy.typing as npt
from helpers import tiny_sample

from pipelines.sample import Sample


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
            out.append(out[-offset])


def lz4_stored(content: bytes) -> bytes:
    """Return `content` as an LZ4 block of one literal."""
    length = len(content)
    if length < 15:
        return bytes([length << 4]) + content
    more, last = divmod(length - 15, 255)
    return b"\xf0" + b"\xff" * more + bytes([last]) + content


def padded(content: bytes) -> bytes:
    """Return `content`, padded with zeros to a multiple of 16."""
    return content + bytes(-len(content) % 16)


def read(content: bytes) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
    """Return (counts, target) of the packed sample `content`."""
    magic, version, n, c, s, p, r, t, *target = struct.unpack_from("<8s7I4f", content)
    assert (magic, version) == (b"CFPACKED", 2)
    directory = np.frombuffer(content, "<u4", n // s * p * 2, 64).reshape(n // s, p, 2)
    start = 64 + directory.nbytes
    start += -start % 16
    raw = np.frombuffer(lz4_inflate(content[start : start + t]), np.uint8).reshape(2, c, r).astype(np.int64)
    table = (raw[0] + 256 * raw[1]).T.astype(np.int16)
    start += t + -t % 16
    covered = content[:56] + content[60:start]
    assert struct.unpack_from("<II", content, 52) == (crc32c.crc32c(content[start:]), crc32c.crc32c(covered))
    total = 0
    counts = np.empty((n // s, s * n * n, c), np.int16)
    for chunk in range(n // s):
        rows = np.zeros(s * n * n, np.int64)
        for plane in range(p):
            length, crc = directory[chunk, plane].tolist()
            end = start + length + -length % 16
            assert crc == crc32c.crc32c(content[start:end])
            block = lz4_inflate(content[start : start + length])
            rows += np.frombuffer(block, np.uint8).astype(np.int64) << 8 * plane
            total += sum(block)
            start = end
        counts[chunk] = table[rows]
    assert start == len(content)
    assert struct.unpack_from("<I", content, 60) == (total % 2**32,)
    return counts.reshape(n, n, n, c), np.array(target, np.float32)


def write(
    table: list[list[int]],
    rows: list[list[int]],
    *,
    size: int,
    version: int = 2,
    target: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4),
    lengthen: bytes = b"",
    byte_sum: int | None = None,
) -> bytes:
    """Return a packed sample with a chunk of one plane for each of `rows`.

    Args:
        lengthen: bytes appended to the last chunk.
        byte_sum: sum of all inflated bytes to state in the header; default the correct one.
    """
    raw = np.array(table, np.int64)
    planes = np.stack([raw & 255, raw >> 8 & 255]).transpose(0, 2, 1).astype(np.uint8)
    table_block = lz4_stored(planes.tobytes())
    chunks = [lz4_stored(bytes(row)) for row in rows]
    chunks[-1] = lz4_stored(bytes(rows[-1]) + lengthen)
    fields = (b"CFPACKED", version, size, 4, size // len(rows), 1, len(table), len(table_block))
    header = struct.pack("<8s7I4f", *fields, *target)
    directory = b"".join(struct.pack("<II", len(chunk), crc32c.crc32c(padded(chunk))) for chunk in chunks)
    content = b"".join(map(padded, chunks))
    header += struct.pack("<I", crc32c.crc32c(content))
    byte_sum = sum(map(sum, rows)) + sum(lengthen) if byte_sum is None else byte_sum
    rest = struct.pack("<I", byte_sum) + padded(directory) + padded(table_block)
    crc = struct.pack("<I", crc32c.crc32c(rest, crc32c.crc32c(header)))
    return header + crc + rest + content


TABLE = [[0, 0, 0, 0], [1, 2, 3, 32767], [5, 6, 7, 8]]


def samples() -> dict[str, Sample]:
    """Return samples with one, two and three byte planes, and with the extremes of counts."""
    rng = np.random.default_rng(3)
    target = np.array([-1, 1, 0.5, 0], np.float32)
    return {
        "usual": tiny_sample(1, 16),
        "larger": tiny_sample(2, 48),
        "chunks of 64 KiB": tiny_sample(3, 64),
        "one voxel": Sample(np.full((1, 1, 1, 4), 32767, np.int16), target),
        "all equal": Sample(np.zeros((16, 16, 16, 4), np.int16), target),
        "256 different": Sample(rng.integers(0, 4, (16, 16, 16, 4)).astype(np.int16), target),
        "all different": Sample(rng.integers(0, 2**15, (48, 48, 48, 4)).astype(np.int16), target),
        "one redshift": Sample(rng.poisson(1, (32, 32, 32, 1)).astype(np.int16), target),
    }
