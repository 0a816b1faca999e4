"""Inflating many LZ4 blocks in one call, against an inflater written from the format's description."""

from __future__ import annotations

import lz4.block
import numpy as np
import pytest
import reference_packed_reader as reference

from pipelines.formats.packed.lz4 import FRAME_BLOCK_BYTES, inflate_many

RNG = np.random.default_rng(5)


def block(length: int) -> memoryview:
    """Return the LZ4 block of `length` compressible bytes."""
    content = RNG.poisson(0.5, length).astype(np.uint8).tobytes()
    return memoryview(lz4.block.compress(content, store_size=False))


def test_blocks_inflate_together_as_one_by_one() -> None:
    for count in (1, 2, 8):
        blocks = [block(FRAME_BLOCK_BYTES) for _ in range(count)]
        assert inflate_many(blocks) == b"".join(reference.lz4_inflate(bytes(each)) for each in blocks)


WRONG = {
    "short": block(FRAME_BLOCK_BYTES - 1),
    "long": block(FRAME_BLOCK_BYTES + 1),
    "empty": block(0),
    "nothing": memoryview(b""),
    "garbage": memoryview(b"\xff" * 1000),
    "cut": block(FRAME_BLOCK_BYTES)[:-1],
    "trailing byte": memoryview(bytes(block(FRAME_BLOCK_BYTES)) + b"\0"),
    "stored": memoryview(reference.lz4_stored(bytes(FRAME_BLOCK_BYTES))),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_block_of_another_length_is_noticed(kind: str) -> None:
    for at in range(3):
        blocks = [block(FRAME_BLOCK_BYTES) for _ in range(2)]
        blocks.insert(at, WRONG[kind])
        assert inflate_many(blocks) is None


def test_lengths_that_compensate_each_other_are_noticed() -> None:
    assert inflate_many([block(FRAME_BLOCK_BYTES - 1), block(FRAME_BLOCK_BYTES + 1)]) is None
