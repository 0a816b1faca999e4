"""The packed format, against a second reader and writer of it."""

from __future__ import annotations

import struct
from pathlib import Path

import crc32c
import numpy as np
import pytest
import reference_packed_reader as reference
from helpers import tiny_sample
from reference_packed_reader import TABLE
from reference_packed_reader import write as build

from pipelines.errors import AccessError, DataError
from pipelines.formats.packed.decode import open_packed, read_slices
from pipelines.formats.packed.encode import encode, slices_per_chunk
from pipelines.formats.registry import FORMATS
from pipelines.sample import Sample, SampleSpec

PATH = Path("shard_000000.tar/universe_0000.packed")


def read(content: bytes, spec: SampleSpec | None = None) -> Sample:
    return FORMATS["packed"].parse(PATH, {".packed": content}, spec)


@pytest.mark.parametrize("name", reference.samples())
def test_the_reference_reader_reads_what_was_written_and_so_does_ours(name: str) -> None:
    sample = reference.samples()[name]
    content = b"".join(encode(sample))
    counts, target = reference.read(content)
    ours = read(content, SampleSpec(*sample.counts.shape[2:]))
    for found in (counts, ours.counts):
        np.testing.assert_array_equal(found, sample.counts)
    for found_target in (target, ours.target):
        np.testing.assert_array_equal(found_target, sample.target)


def test_three_planes_number_more_than_65536_distinct_voxels() -> None:
    content = b"".join(encode(reference.samples()["all different"]))
    assert struct.unpack_from("<I", content, 24) == (3,)
    assert struct.unpack_from("<I", content, 28)[0] > 65536


def test_samples_of_the_reference_writer_are_read() -> None:
    found = read(build(TABLE, [[0, 1, 2, 1], [2, 2, 0, 1]], size=2))
    np.testing.assert_array_equal(
        found.counts.reshape(8, 4), np.array(TABLE, np.int16)[[0, 1, 2, 1, 2, 2, 0, 1]]
    )
    np.testing.assert_array_equal(found.target, np.array([0.1, 0.2, 0.3, 0.4], np.float32))


def test_blocks_longer_than_their_inflated_content_are_read() -> None:
    rows = np.random.default_rng(1).integers(0, 3, (4, 1 << 16))
    found = read(build(TABLE, rows.tolist(), size=64))
    np.testing.assert_array_equal(found.counts.reshape(4, -1, 4), np.array(TABLE, np.int16)[rows])


def test_packed_samples_are_smaller_than_gzip(tmp_path: Path) -> None:
    sample = tiny_sample(4, 32)
    (compressed,) = FORMATS["tfrecord_gzip"].write(tmp_path, "a", sample)
    assert len(b"".join(encode(sample))) < compressed.bytes


def test_a_chunk_is_a_whole_number_of_slices() -> None:
    for size in (1, 2, 7, 16, 32, 48, 64, 96, 112, 128, 160, 256, 512):
        slices = slices_per_chunk(size)
        assert size % slices == 0
        assert slices * size**2 <= 65536 or slices == 1
    assert slices_per_chunk(128) * 128**2 == 65536


def test_all_levels_and_chunk_lengths_hold_the_same_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = tiny_sample(5, 16)
    for level in (3, 12):
        monkeypatch.setattr("pipelines.formats.packed.encode.LZ4_LEVEL", level)
        for slices in (1, 4, 16):
            counts, _ = reference.read(b"".join(encode(sample, slices=slices)))
            np.testing.assert_array_equal(counts, sample.counts)


def test_slices_are_read_without_the_other_chunks(tmp_path: Path) -> None:
    sample, path = reference.samples()["all different"], tmp_path / "many"
    first_chunk, *chunks = encode(sample)
    content, slices = b"".join((first_chunk, *chunks)), slices_per_chunk(48)
    broken = bytearray(content)
    broken[len(first_chunk)] ^= 1
    for first, stop in ((0, 1), (0, 48), (5, 9), (15, 17), (47, 48), (16, 32), (slices, 48)):
        path.write_bytes(bytes(1024) + content + b"another one")
        np.testing.assert_array_equal(read_slices(path, first, stop, 1024), sample.counts[first:stop])
        # The same with the first chunk damaged, which only its own slices notice.
        path.write_bytes(bytes(1024) + broken + b"another one")
        if first >= slices:
            np.testing.assert_array_equal(read_slices(path, first, stop, 1024), sample.counts[first:stop])
        else:
            with pytest.raises(DataError, match="the CRC of plane 0 of chunk 0 is wrong"):
                read_slices(path, first, stop, 1024)


def test_slices_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.packed").write_bytes(b"".join(encode(tiny_sample(1, 16))))
    for first, stop in ((-1, 1), (3, 3), (5, 4), (0, 17)):
        with pytest.raises(DataError, match=f"no D-slices {first} to {stop}"):
            read_slices(tmp_path / "a.packed", first, stop)
    with pytest.raises(AccessError):
        read_slices(tmp_path / "b.packed", 0, 1)


def test_every_changed_or_missing_byte_is_noticed() -> None:
    content = build(TABLE, [[0, 1, 2, 1], [2, 2, 0, 1]], size=2)
    damaged = [content[:at] for at in range(len(content))] + [content + b"\0"]
    for at in range(len(content)):
        for bit in (0, 7):
            broken = bytearray(content)
            broken[at] ^= 1 << bit
            damaged.append(bytes(broken))
    for each in damaged:
        with pytest.raises(DataError) as raised:
            read(each)
        assert raised.value.path == str(PATH) and "\n" not in str(raised.value)


# The messages that a user meets, by content with valid checksums; a size of 2 but where noted.
INVALID = {
    "version 1, not 2": build(TABLE, [[0] * 8], size=2, version=1),
    "version 0, not 2": build(TABLE, [[0] * 8], size=2, version=0),
    "chunk 0 has the row 3 of a table of 3": build(TABLE, [[0] * 7 + [3]], size=2),
    "chunk 1 has the row 255": build(TABLE, [[0] * 4, [255] * 4], size=2),
    "plane 0 of chunk 0 inflates to 7 bytes, not 8": build(TABLE, [[0] * 7], size=2),
    "plane 0 of chunk 3 inflates to 65535 bytes, not 65536": build(
        TABLE, [*[[0] * (1 << 16)] * 3, [0] * 65535], size=64
    ),
    "plane 0 of chunk 0 is not an LZ4 block of 8 bytes": build(TABLE, [[0] * 8], size=2, lengthen=b"\0"),
    "its chunks inflate to other bytes than were packed": build(TABLE, [[0, 1] * 4], size=2, byte_sum=5),
    "a count is -1": build([[0, 0, 0, -1]], [[0] * 8], size=2),
    "the target is": build(TABLE, [[0] * 8], size=2, target=(0, 0, float("nan"), 0)),
    "header is not valid": build(TABLE * 3, [[0] * 8], size=2),
    "plane 0 of chunk 0 inflates to 8 bytes, not 27": build(TABLE, [[0] * 8], size=3),
    "is not a packed sample": b"",
    "is cut off after 6 bytes": b"CFPACK",
    "bytes; its chunks end at": build(TABLE, [[0] * 8], size=2) + b"\0",
    "is not a packed": b"\x1f\x8b" + bytes(100),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_content_with_valid_checksums_is_refused(message: str) -> None:
    size = 3 if "27" in message else 64 if "65535" in message else 2
    for use in (read, lambda content: open_packed(PATH, content, SampleSpec(size)).decode()):
        with pytest.raises(DataError, match=message) as raised:
            use(INVALID[message])
        assert raised.value.path == str(PATH)


def test_a_sample_of_another_shape_is_refused() -> None:
    with pytest.raises(DataError, match="the other samples have"):
        read(b"".join(encode(tiny_sample(1, 8))), SampleSpec(16))


def test_a_header_cannot_ask_for_more_memory_than_lz4_can_fill() -> None:
    content = bytearray(build(TABLE, [[0] * 8], size=2))
    # 40,000^3 voxels in one chunk of as many slices, with a valid checksum.
    struct.pack_into("<I", content, 12, 40000)
    struct.pack_into("<I", content, 20, 40000)
    end = 80 + len(reference.padded(reference.lz4_stored(bytes(24))))
    struct.pack_into("<I", content, 56, crc32c.crc32c(bytes(content[:56] + content[60:end])))
    with pytest.raises(DataError, match="too short for its inflated length"):
        read(bytes(content))
