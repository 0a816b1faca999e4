"""Decompression of raw LZ4 blocks, one at a time or many in one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import lz4.block
import lz4.frame

from pipelines.errors import DataError

REMEDY = "convert the sample again"

FRAME_BLOCK_BYTES = 1 << 16
"""Inflated bytes of each block of `inflate_many`, the most that the frame's kind allows."""

_END_MARK = bytes(4)


def inflate(path: Path, block: memoryview, length: int, name: str) -> bytes:
    """Inflate `block` to `length` bytes.

    Args:
        path: file that errors name.
        name: name of the block in errors.

    Raises:
        DataError: the block is damaged or has another length.
    """
    try:
        content = bytes(lz4.block.decompress(block, uncompressed_size=length))
    except (lz4.block.LZ4BlockError, OverflowError) as error:
        raise DataError(path, f"{name} is not an LZ4 block of {length} bytes", REMEDY) from error
    if len(content) != length:
        raise DataError(path, f"{name} inflates to {len(content)} bytes, not {length}", REMEDY)
    return content


def inflate_many(blocks: Sequence[memoryview]) -> bytes | None:
    """Inflate `blocks` to FRAME_BLOCK_BYTES each and concatenate them; None if one does not inflate so.

    They are put into a frame (lz4_Frame_format.md), which the library inflates in one call. Each call
    releases the GIL, and two threads that alternate for every block lose an eighth of their time. A
    frame cannot hold a block longer than what it inflates to, valid or not.
    """
    if any(len(block) > FRAME_BLOCK_BYTES for block in blocks):
        return None
    pieces: list[bytes | memoryview] = [_frame_header(FRAME_BLOCK_BYTES * len(blocks))]
    for block in blocks:
        pieces += (len(block).to_bytes(4, "little"), block)
    try:
        # The header states the total length, and the library refuses frames of another one.
        return bytes(lz4.frame.decompress(b"".join([*pieces, _END_MARK])))
    except RuntimeError:
        return None


@functools.cache
def _frame_header(length: int) -> bytes:
    """Return the header of a frame of independent blocks that inflates to `length` bytes."""
    context = lz4.frame.create_compression_context()
    kind = {"block_size": lz4.frame.BLOCKSIZE_MAX64KB, "block_linked": False}
    return bytes(lz4.frame.compress_begin(context, source_size=length, **kind))
