"""Raw LZ4 blocks to bytes: one at a time, or many in one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import lz4.block
import lz4.frame

from pipelines.errors import DataError

REMEDY = "convert the sample again"

FRAME_BLOCK_BYTES = 1 << 16
"""Bytes that each block of `inflate_many` becomes: the most that a frame of that kind lets it."""

_END = bytes(4)


def inflate(path: Path, block: memoryview, length: int, name: str) -> bytes:
    """The `length` bytes that `block`, called `name`, becomes; DataError of `path` where it does not."""
    try:
        content = bytes(lz4.block.decompress(block, uncompressed_size=length))
    except (lz4.block.LZ4BlockError, OverflowError) as error:
        raise DataError(path, f"{name} is no LZ4 block of {length} bytes", REMEDY) from error
    if len(content) != length:
        raise DataError(path, f"{name} inflates to {len(content)} bytes, not {length}", REMEDY)
    return content


def inflate_many(blocks: Sequence[memoryview]) -> bytes | None:
    """What `blocks` become, FRAMED bytes each, one after the other; None where one of them does not.

    They are put into a frame, which the library inflates in one call: each call lets go of the GIL, and
    two threads that take turns at it for every block lose an eighth of their time. The layout is that of
    lz4_Frame_format.md, which has no room for a block that is longer than what it becomes, sound or not.
    """
    if any(len(block) > FRAME_BLOCK_BYTES for block in blocks):
        return None
    parts: list[bytes | memoryview] = [_head(FRAME_BLOCK_BYTES * len(blocks))]
    for block in blocks:
        parts += (len(block).to_bytes(4, "little"), block)
    try:
        # The frame's head tells its length, and the library refuses blocks that become more or less.
        return bytes(lz4.frame.decompress(b"".join([*parts, _END])))
    except RuntimeError:
        return None


@functools.cache
def _head(length: int) -> bytes:
    """How a frame begins that becomes `length` bytes, of blocks that know nothing of each other."""
    context = lz4.frame.create_compression_context()
    kind = {"block_size": lz4.frame.BLOCKSIZE_MAX64KB, "block_linked": False}
    return bytes(lz4.frame.compress_begin(context, source_size=length, **kind))
