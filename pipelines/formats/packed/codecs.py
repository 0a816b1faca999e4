"""Decompression of the blocks of a packed sample; `encode` compresses them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard

from pipelines.errors import DataError
from pipelines.storage.location import Location

REMEDY = "convert the sample again"

Integers = npt.NDArray[np.int64]

_threads = threading.local()


class Codec(IntEnum):
    """The form of a block, by its number in the header."""

    STORED = 0
    """The content as it is."""

    LZ4 = 1
    """A raw LZ4 block, without a frame (lz4_Block_format.md)."""

    ZSTD = 2
    """A Zstandard frame that states its content size (RFC 8878)."""


MAX_RATIO = {Codec.STORED: 1, Codec.LZ4: 255, Codec.ZSTD: 1 << 15}
"""The most that a codec compresses, which bounds the memory that a damaged header can ask for."""


def inflate(
    path: Location,
    codec: Codec,
    content: memoryview,
    starts: Integers,
    sizes: Integers,
    lengths: Integers,
    name: str,
) -> bytes:
    """Inflate the blocks of `content` at `starts`, and concatenate them.

    The GIL is released while a block is inflated, and for Zstandard only once for all of them.

    Args:
        path: file that errors name.
        sizes, lengths: bytes of each block, compressed and inflated; nothing is stored for no bytes.
        name: name of the blocks in errors.

    Raises:
        DataError: a block is damaged or has another length.
    """
    present = lengths > 0
    if (sizes[~present] > 0).any():
        raise DataError(path, f"a block of {name} should be empty", REMEDY)
    starts, sizes, lengths = starts[present], sizes[present], lengths[present]
    try:
        return b"".join(_INFLATE[codec](content, starts, sizes, lengths))
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, OverflowError, ValueError) as error:
        fault = f"{name} do not inflate to their {int(lengths.sum())} bytes as {codec.name} ({error})"
        raise DataError(path, fault, REMEDY) from error


def _inflate_stored(content: memoryview, starts: Integers, sizes: Integers, lengths: Integers) -> Any:
    ends = (starts + sizes).tolist()
    if (sizes != lengths).any() or max(ends, default=0) > len(content):
        raise ValueError("other lengths")
    return [content[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]


def _inflate_lz4(content: memoryview, starts: Integers, sizes: Integers, lengths: Integers) -> Any:
    blocks = []
    for start, size, length in zip(starts.tolist(), sizes.tolist(), lengths.tolist(), strict=True):
        block = lz4.block.decompress(content[start : start + size], uncompressed_size=length)
        if len(block) != length:
            raise ValueError(f"a block has {len(block)} bytes instead of {length}")
        blocks.append(block)
    return blocks


def _inflate_zstd(content: memoryview, starts: Integers, sizes: Integers, lengths: Integers) -> Any:
    if not len(starts):
        return ()
    # A decompressor keeps state between its calls, so that each thread needs its own.
    if not hasattr(_threads, "decompressor"):
        _threads.decompressor = zstandard.ZstdDecompressor()
    # The library takes numbers in the byte order of the machine.
    extents = np.stack([starts, sizes], 1).astype(np.uint64).tobytes()
    frames = zstandard.BufferWithSegments(content, extents)
    # It refuses a frame whose content has another length than is asked for.
    return _threads.decompressor.multi_decompress_to_buffer(frames, lengths.astype(np.uint64).tobytes())


_INFLATE: dict[Codec, Callable[..., Any]] = {
    Codec.STORED: _inflate_stored,
    Codec.LZ4: _inflate_lz4,
    Codec.ZSTD: _inflate_zstd,
}
