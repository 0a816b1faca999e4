"""LZ4 blocks in one call, against an inflater made from the description of the format."""

from __future__ import annotations

import lz4.block
import numpy as np
import packed_book
import pytest

from pipelines.formats.packed.lz4 import FRAME_BLOCK_BYTES, inflate_many

RNG = np.random.default_rng(5)


def block(length: int) -> memoryview:
    """A compressible block of `length` bytes."""
    content = RNG.poisson(0.5, length).astype(np.uint8).tobytes()
    return memoryview(lz4.block.compress(content, store_size=False))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_blocks_inflate_together_to_what_each_becomes(count: int) -> None:
    blocks = [block(FRAME_BLOCK_BYTES) for _ in range(count)]
    assert inflate_many(blocks) == b"".join(packed_book.lz4_inflate(bytes(each)) for each in blocks)


@pytest.mark.parametrize(
    "wrong",
    [
        block(FRAME_BLOCK_BYTES - 1),
        block(FRAME_BLOCK_BYTES + 1),
        block(0),
        memoryview(b""),
        memoryview(b"\xff" * 1000),
        block(FRAME_BLOCK_BYTES)[:-1],
        memoryview(bytes(block(FRAME_BLOCK_BYTES)) + b"\0"),
        memoryview(packed_book.lz4_stored(bytes(FRAME_BLOCK_BYTES))),
    ],
    ids=["short", "long", "empty", "nothing", "garbage", "cut", "longer", "stored"],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_block_that_becomes_anything_else_is_noticed(wrong: memoryview, at: int) -> None:
    blocks = [block(FRAME_BLOCK_BYTES) for _ in range(2)]
    blocks.insert(at, wrong)
    assert inflate_many(blocks) is None


def test_lengths_that_make_up_for_each_other_are_noticed() -> None:
    assert inflate_many([block(FRAME_BLOCK_BYTES - 1), block(FRAME_BLOCK_BYTES + 1)]) is None
