"""The packed form, against another reader and writer of it."""

from __future__ import annotations

import struct
from pathlib import Path

import crc32c
import numpy as np
import packed_book
import pytest
from helpers import tiny_sample
from packed_book import TABLE
from packed_book import write as build

from pipelines.errors import AccessError, DataError
from pipelines.formats.packed.decode import open_packed, read_slices
from pipelines.formats.packed.encode import encode, slices_per_chunk
from pipelines.formats.registry import FORMATS
from pipelines.sample import Sample, SampleSpec

PATH = Path("shard_000000.tar/universe_0000.packed")


def read(content: bytes, spec: SampleSpec | None = None) -> Sample:
    return FORMATS["packed"].parse(PATH, {".packed": content}, spec)


@pytest.mark.parametrize("name", packed_book.samples())
def test_another_reader_finds_what_was_written_and_so_do_we(name: str) -> None:
    sample = packed_book.samples()[name]
    content = b"".join(encode(sample))
    counts, target = packed_book.read(content)
    found = read(content, SampleSpec(*sample.counts.shape[2:]))
    for seen in (counts, found.counts):
        np.testing.assert_array_equal(seen, sample.counts)
    for said in (target, found.target):
        np.testing.assert_array_equal(said, sample.target)


def test_more_tuples_than_two_bytes_can_number_are_kept() -> None:
    content = b"".join(encode(packed_book.samples()["all different"]))
    assert struct.unpack_from("<I", content, 24) == (3,)
    assert struct.unpack_from("<I", content, 28)[0] > 65536


def test_what_another_writer_made_is_read() -> None:
    found = read(build(TABLE, [[0, 1, 2, 1], [2, 2, 0, 1]], size=2))
    np.testing.assert_array_equal(
        found.counts.reshape(8, 4), np.array(TABLE, np.int16)[[0, 1, 2, 1, 2, 2, 0, 1]]
    )
    np.testing.assert_array_equal(found.target, np.array([0.1, 0.2, 0.3, 0.4], np.float32))


def test_blocks_that_are_longer_than_what_they_hold_are_read() -> None:
    rows = np.random.default_rng(1).integers(0, 3, (4, 1 << 16))
    found = read(build(TABLE, rows.tolist(), size=64))
    np.testing.assert_array_equal(found.counts.reshape(4, -1, 4), np.array(TABLE, np.int16)[rows])


def test_a_chunk_of_64_kib_that_is_cut_short_is_named() -> None:
    whole = [[0] * (1 << 16)] * 3
    with pytest.raises(DataError, match="plane 0 of chunk 3 inflates to 65535 bytes, not 65536"):
        read(build(TABLE, [*whole, [0] * 65535], size=64))


def test_it_is_smaller_than_gzip(tmp_path: Path) -> None:
    sample = tiny_sample(4, 32)
    (compressed,) = FORMATS["tfrecord_gzip"].write(tmp_path, "a", sample)
    assert len(b"".join(encode(sample))) < compressed.bytes


@pytest.mark.parametrize("size", [1, 2, 7, 16, 32, 48, 64, 96, 112, 128, 160, 256, 512])
def test_a_chunk_is_a_whole_number_of_slices(size: int) -> None:
    slices = slices_per_chunk(size)
    assert size % slices == 0
    assert slices * size**2 <= 65536 or slices == 1
    assert slices_per_chunk(128) * 128**2 == 65536


@pytest.mark.parametrize("level", [0, 12])
@pytest.mark.parametrize("slices", [1, 4, 16])
def test_other_levels_and_chunks_hold_the_same(level: int, slices: int) -> None:
    sample = tiny_sample(5, 16)
    counts, _ = packed_book.read(b"".join(encode(sample, level=level, slices=slices)))
    np.testing.assert_array_equal(counts, sample.counts)


@pytest.mark.parametrize(("first", "stop"), [(0, 1), (0, 48), (5, 9), (15, 17), (47, 48), (16, 32)])
def test_a_slab_is_read_alone(first: int, stop: int, tmp_path: Path) -> None:
    sample = packed_book.samples()["all different"]
    content = b"".join(encode(sample))
    path = tmp_path / "many"
    path.write_bytes(bytes(1024) + content + b"another one")
    np.testing.assert_array_equal(read_slices(path, first, stop, 1024), sample.counts[first:stop])
    # The other chunks are not even looked at.
    slices = slices_per_chunk(48)
    broken = bytearray(path.read_bytes())
    if first >= slices:
        begin = 1024 + len(content) - sum(map(len, list(encode(sample))[1:]))
        broken[begin] ^= 1
        path.write_bytes(broken)
        np.testing.assert_array_equal(read_slices(path, first, stop, 1024), sample.counts[first:stop])
        with pytest.raises(DataError, match="the CRC of plane 0 of chunk 0 is wrong"):
            read_slices(path, 0, 1, 1024)


@pytest.mark.parametrize(("first", "stop"), [(-1, 1), (3, 3), (5, 4), (0, 17)])
def test_slabs_that_are_not_there_are_refused(first: int, stop: int, tmp_path: Path) -> None:
    (tmp_path / "a.packed").write_bytes(b"".join(encode(tiny_sample(1, 16))))
    with pytest.raises(DataError, match=f"no D-slices {first} to {stop}"):
        read_slices(tmp_path / "a.packed", first, stop)
    with pytest.raises(AccessError, match="cannot be read"):
        read_slices(tmp_path / "b.packed", 0, 1)


def test_no_byte_can_change_and_no_end_can_be_missing() -> None:
    whole = build(TABLE, [[0, 1, 2, 1], [2, 2, 0, 1]], size=2)
    for at in range(len(whole)):
        for bit in (0, 7):
            broken = bytearray(whole)
            broken[at] ^= 1 << bit
            with pytest.raises(DataError) as raised:
                read(bytes(broken))
            assert raised.value.path == str(PATH) and "\n" not in str(raised.value)
        with pytest.raises(DataError):
            read(whole[:at])
    with pytest.raises(DataError, match=f"has {len(whole) + 1} bytes; its chunks end at {len(whole)}"):
        read(whole + b"\0")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            build(TABLE, [[0] * 8], size=2, version=1),
            "version 1, not 2",
        ),
        (
            build(TABLE, [[0] * 8], size=2, version=0),
            "version 0, not 2",
        ),
        (
            build(TABLE, [[0] * 7 + [3]], size=2),
            "chunk 0 has the row 3 of a table of 3",
        ),
        (build(TABLE, [[0] * 4, [255] * 4], size=2), "chunk 1 has the row 255"),
        (
            build(TABLE, [[0] * 7], size=2),
            "plane 0 of chunk 0 inflates to 7 bytes, not 8",
        ),
        (
            build(TABLE, [[0] * 8], size=2, lengthen=b"\0"),
            "plane 0 of chunk 0 is not an LZ4 block of 8 bytes",
        ),
        (
            build(TABLE, [[0, 1] * 4], size=2, total=5),
            "its chunks inflate to other bytes than were packed",
        ),
        (build([[0, 0, 0, -1]], [[0] * 8], size=2), "a count is -1"),
        (
            build(TABLE, [[0] * 8], size=2, target=(0, 0, float("nan"), 0)),
            "the target is",
        ),
        (build(TABLE * 3, [[0] * 8], size=2), "header is not valid"),
        (
            build(TABLE, [[0] * 8], size=3),
            "plane 0 of chunk 0 inflates to 8 bytes, not 27",
        ),
        (b"", "is not a packed sample"),
        (b"CFPACK", "is cut off after 6 bytes"),
        (b"\x1f\x8b" + bytes(100), "is not a packed sample"),
    ],
)
@pytest.mark.parametrize("fully_validate", [False, True])
def test_lies_with_sound_checksums_are_refused(content: bytes, said: str, fully_validate: bool) -> None:
    with pytest.raises(DataError, match=said) as raised:
        if fully_validate:
            open_packed(PATH, content, SampleSpec(2 if "27" not in said else 3)).decode()
        else:
            read(content)
    assert raised.value.path == str(PATH)


def test_a_sample_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match="the other samples have"):
        read(b"".join(encode(tiny_sample(1, 8))), SampleSpec(16))


def test_a_header_cannot_ask_for_more_memory_than_lz4_can_fill() -> None:
    content = bytearray(build(TABLE, [[0] * 8], size=2))
    # 40,000^3 voxels in one chunk of as many slices, and a checksum that says so.
    struct.pack_into("<I", content, 12, 40000)
    struct.pack_into("<I", content, 20, 40000)
    end = 80 + len(packed_book.padded(packed_book.lz4_stored(bytes(24))))
    struct.pack_into("<I", content, 56, crc32c.crc32c(bytes(content[:56] + content[60:end])))
    with pytest.raises(DataError, match="too short for its inflated length"):
        read(bytes(content))
