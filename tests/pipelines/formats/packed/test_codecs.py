"""Inflating many blocks in one call, also against an inflater of LZ4 written from its description."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import reference_packed_reader as reference
import zstandard

from pipelines.errors import DataError
from pipelines.formats.packed.codecs import MAX_RATIO, Codec, inflate

PATH = Path("a.packed")
RNG = np.random.default_rng(5)
LENGTH = 3000


def content(length: int) -> bytes:
    """Return `length` compressible bytes."""
    return RNG.poisson(0.5, length).astype(np.uint8).tobytes()


def join(codec: Codec, blocks: list[bytes], lengths: list[int], gap: bytes = b"") -> bytes:
    """Inflate `blocks` that lie `gap` apart."""
    sizes = np.array([len(block) for block in blocks], np.int64)
    starts = len(gap) + np.cumsum(sizes + len(gap)) - sizes - len(gap)
    joined = memoryview(gap + b"".join(block + gap for block in blocks))
    return inflate(PATH, codec, joined, starts, sizes, np.array(lengths, np.int64), "blocks")


@pytest.mark.parametrize("codec", Codec)
def test_blocks_inflate_together_as_one_by_one(codec: Codec) -> None:
    for lengths in ([], [1], [LENGTH], [LENGTH] * 8, [1, 2, 70000, 3], [0], [0, 0, 5], [5, 0], [7, 0, 9]):
        contents = [content(length) for length in lengths]
        blocks = [reference.deflate(codec, each) for each in contents]
        for gap in (b"", b"\0", b"between"):
            assert join(codec, blocks, lengths, gap) == b"".join(contents)


def test_lz4_as_the_format_describes_it() -> None:
    contents = [content(length) for length in (1, 14, 15, 16, 269, 270, 271, 70000)]
    stored = [reference.lz4_stored(each) for each in contents]
    assert join(Codec.LZ4, stored, list(map(len, contents))) == b"".join(contents)
    for each in contents:
        assert reference.lz4_inflate(reference.deflate(Codec.LZ4, each)) == each


def test_zstandard_frames_of_any_kind_are_read() -> None:
    each = content(LENGTH)
    for compressor in (
        zstandard.ZstdCompressor(level=-5),
        zstandard.ZstdCompressor(level=22),
        zstandard.ZstdCompressor(write_checksum=True),
        zstandard.ZstdCompressor(write_content_size=False),
    ):
        assert join(Codec.ZSTD, [compressor.compress(each)] * 2, [LENGTH] * 2) == each * 2


@pytest.mark.parametrize("codec", [Codec.LZ4, Codec.ZSTD])
def test_no_codec_exceeds_its_ratio(codec: Codec) -> None:
    longest = bytes(1 << 23)
    assert len(reference.deflate(codec, longest)) * MAX_RATIO[codec] >= len(longest)
    if codec == Codec.ZSTD:
        # A block of one byte 128 Ki times has four bytes (RFC 8878, 3.1.1.2), the frame's header nine.
        frame = bytes.fromhex("28b52ffd a0 00000400 020010 00 030010 00")
        assert join(codec, [frame], [1 << 18]) == bytes(1 << 18)
        assert (len(frame) - 9) * MAX_RATIO[codec] == 1 << 18


WRONG = {
    "short": lambda codec: reference.deflate(codec, content(LENGTH - 1)),
    "long": lambda codec: reference.deflate(codec, content(LENGTH + 1)),
    "nothing": lambda codec: b"",
    "garbage": lambda codec: b"\xff" * 1000,
    "cut": lambda codec: reference.deflate(codec, content(LENGTH))[:-1],
    "of another codec": lambda codec: reference.deflate(
        Codec.LZ4 if codec == Codec.ZSTD else 2, content(LENGTH)
    ),
}


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("kind", WRONG)
def test_a_block_of_another_length_is_refused(kind: str, codec: Codec) -> None:
    for at in range(3):
        blocks = [reference.deflate(codec, content(LENGTH)) for _ in range(2)]
        blocks.insert(at, WRONG[kind](codec))
        with pytest.raises(DataError, match=f"blocks do not inflate to their {3 * LENGTH} bytes") as raised:
            join(codec, blocks, [LENGTH] * 3)
        assert raised.value.path == str(PATH) and "\n" not in str(raised.value)


def test_a_byte_after_an_lz4_block_is_refused() -> None:
    with pytest.raises(DataError):
        join(Codec.LZ4, [reference.deflate(Codec.LZ4, content(LENGTH)) + b"\0"], [LENGTH])


@pytest.mark.parametrize("codec", Codec)
def test_lengths_that_compensate_each_other_are_refused(codec: Codec) -> None:
    for lengths in itertools.permutations((LENGTH - 1, LENGTH, LENGTH + 1)):
        if lengths == (LENGTH - 1, LENGTH, LENGTH + 1):
            continue
        blocks = [reference.deflate(codec, content(LENGTH + more)) for more in (-1, 0, 1)]
        with pytest.raises(DataError):
            join(codec, blocks, list(lengths))


@pytest.mark.parametrize("codec", Codec)
def test_a_block_for_no_bytes_is_refused(codec: Codec) -> None:
    for empty in (zstandard.compress(b""), reference.lz4_stored(b""), b"\0"):
        with pytest.raises(DataError):
            join(codec, [reference.deflate(codec, content(9)), empty], [9, 0])


@pytest.mark.parametrize("codec", Codec)
def test_a_block_beyond_the_content_is_refused(codec: Codec) -> None:
    block, length = reference.deflate(codec, content(9)), np.array([9])
    for missing in (1, len(block)):
        with pytest.raises(DataError):
            given = memoryview(block)[missing:]
            inflate(PATH, codec, given, np.array([0]), np.array([len(block)]), length, "blocks")


@pytest.mark.parametrize("codec", Codec)
def test_inflating_is_thread_safe(codec: Codec) -> None:
    contents = [content(1 << 16) for _ in range(8)]
    blocks = [reference.deflate(codec, each) for each in contents]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: join(codec, blocks, [1 << 16] * 8), range(32)):
            assert found == b"".join(contents)
