"""The packed format, against a second reader and writer of it."""

from __future__ import annotations

import itertools
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference_packed_reader as reference
from helpers import slab_of, slabs, tiny_sample
from reference_packed_reader import LZ4, STORED, TABLE, ZSTD, write_version_2
from reference_packed_reader import write as build

from pipelines.dataset.open import open_path
from pipelines.errors import ConfigError, DataError
from pipelines.formats.packed.decode import open_packed, open_slab
from pipelines.formats.packed.distinct import tabulate
from pipelines.formats.packed.encode import PRESETS, UNCOMPRESSED, encode, encode_rows
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.header import escape_planes
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.registry import FORMATS
from pipelines.sample import Sample, SampleSpec
from pipelines.slab import Slab

PATH = Path("shard_000000.tar/universe_0000.packed")

MANY = [[row % 256, row // 256, 3, 32767] for row in range(600)]
"""A table whose escapes take two bytes."""

MANY_ROWS = [*(np.arange(1000) % 600)[:900].reshape(3, 300).tolist(), [0] * 100]
"""Rows of 10^3 voxels in four chunks, the last one shorter and without escapes."""

CODECS = (STORED, LZ4, ZSTD)


def read(content: bytes, spec: SampleSpec | None = None) -> Sample:
    return FORMATS["packed"].parse(PATH, {".packed": content}, spec)


def many(**changes: Any) -> bytes:
    """Return a sample of 10^3 voxels with escapes."""
    return build(MANY, MANY_ROWS, size=10, **changes)


def small(*rows: list[int], **changes: Any) -> bytes:
    """Return a sample of 2^3 voxels without escapes."""
    return build(TABLE, list(rows) or [[0, 1, 2, 1], [2, 2, 0, 1]], size=2, **changes)


def check(content: bytes, sample: Sample) -> None:
    """Check that both readers find `sample` in `content`."""
    counts, target = reference.read(content)
    ours = read(content, SampleSpec(*sample.counts.shape[2:]))
    for found in (counts, ours.counts):
        np.testing.assert_array_equal(found, sample.counts)
    for found_target in (target, ours.target):
        np.testing.assert_array_equal(found_target, sample.target)


@pytest.mark.parametrize("name", reference.samples())
def test_the_reference_reader_reads_what_was_written_and_so_does_ours(name: str) -> None:
    sample = reference.samples()[name]
    for preset in PRESETS:
        check(b"".join(encode(sample, preset)), sample)
    table, rows = tabulate(sample.counts)
    content = b"".join(encode_rows(table, rows, len(sample.counts), sample.target, UNCOMPRESSED))
    check(content, sample)
    chunks = np.split(rows.astype(np.int64), range(1 << 16, len(rows), 1 << 16))
    assert content == build(table, chunks, size=len(sample.counts), target=tuple(sample.target.tolist()))


@pytest.mark.parametrize("chunk_voxels", [1, 16, 100, 255, 256, 257, 1000, 4095, 4096, 4097, 1 << 20])
def test_chunks_of_any_length_hold_the_same_sample(chunk_voxels: int) -> None:
    for sample, preset in itertools.product(
        (tiny_sample(5, 16), reference.samples()["512 different"]), PRESETS
    ):
        check(b"".join(encode(sample, preset, chunk_voxels=chunk_voxels)), sample)


def test_escapes_have_as_many_planes_as_the_highest_needs() -> None:
    planes = {1: 0, 255: 0, 256: 0, 257: 1, 511: 1, 512: 2, 65791: 2, 65792: 3, 1 << 24: 3, 1 << 25: 4}
    for rows, count in (planes | {255 + (1 << 24): 3, 256 + (1 << 24): 4, (1 << 32) - 1: 4}).items():
        assert escape_planes(rows) == count == reference.planes_of(rows) - 1
    for name, count in {
        "256 different": 0,
        "257 different": 1,
        "512 different": 2,
        "all different": 3,
    }.items():
        content = b"".join(encode(reference.samples()[name]))
        assert escape_planes(struct.unpack_from("<I", content, 24)[0]) == count


def test_presets_choose_the_codecs_and_the_size() -> None:
    sparse = np.random.default_rng(1).poisson(0.3, (64, 64, 64, 4)).astype(np.int16)
    sample = Sample(sparse, np.zeros(4, np.float32))
    contents = {preset: b"".join(encode(sample, preset)) for preset in PRESETS}
    codecs = {preset: list(content[32:40]) for preset, content in contents.items()}
    assert codecs["lz4"][:2] == [ZSTD, LZ4]
    assert codecs["fast"][:2] == codecs["small"][:2] == [ZSTD, ZSTD]
    assert max(len(contents["small"]), len(contents["fast"])) < len(contents["lz4"])
    # What cannot be compressed is stored as it is.
    noise = np.random.default_rng(1).permutation(4096).reshape(16, 16, 16, 1).astype(np.int16)
    content = b"".join(encode(Sample(noise, np.zeros(4, np.float32)), "small"))
    assert content[34] == STORED


def test_packed_samples_are_smaller_than_gzip(tmp_path: Path) -> None:
    sample = tiny_sample(4, 32)
    (compressed,) = FORMATS["tfrecord_gzip"].write(tmp_path, "a", sample)
    for preset in PRESETS:
        assert len(b"".join(encode(sample, preset))) < compressed.bytes


def test_presets_mix_in_a_shard(tmp_path: Path) -> None:
    samples = [tiny_sample(index) for index in range(2 * len(PRESETS))]
    encoded = [encode(sample, preset) for sample, preset in zip(samples, [*PRESETS] * 2, strict=True)]
    old = write_version_2([[0, 0, 0, 7]], [[0] * 2048] * 2, size=16)
    members = [(f"{index}{MEMBER_SUFFIX}", content) for index, content in enumerate([*encoded, [old]])]
    write_shard(tmp_path / "a.tar", members)
    ((dataset, *none),) = (open_path(tmp_path / "a.tar"),)
    assert not none and len(dataset) == len(samples) + 1
    for index, sample in enumerate(samples):
        np.testing.assert_array_equal(dataset.read(index).counts, sample.counts)
    assert (dataset.read(len(samples)).counts == [0, 0, 0, 7]).all()


@pytest.mark.parametrize(
    "codecs", [*itertools.product(CODECS, CODECS), (0, 1, 2, 0), (2, 2, 1, 2), (1, 0, 0, 1)]
)
def test_samples_of_the_reference_writer_are_read(codecs: tuple[int, ...]) -> None:
    rows = np.concatenate(MANY_ROWS)
    found = read(many(codecs=codecs))
    np.testing.assert_array_equal(found.counts.reshape(-1, 4), np.array(MANY, np.int16)[rows])
    np.testing.assert_array_equal(found.target, np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    found = read(small(codecs=codecs[:2]))
    np.testing.assert_array_equal(
        found.counts.reshape(-1, 4), np.array(TABLE, np.int16)[[0, 1, 2, 1, 2, 2, 0, 1]]
    )


def test_blocks_longer_than_their_inflated_content_are_read() -> None:
    rows = np.random.default_rng(1).integers(0, 3, (4, 1 << 16))
    blocks = {(chunk, 0): reference.lz4_stored(rows[chunk].astype(np.uint8).tobytes()) for chunk in range(4)}
    found = read(build(TABLE, list(rows), size=64, codecs=(0, LZ4), blocks=blocks))
    np.testing.assert_array_equal(found.counts.reshape(4, -1, 4), np.array(TABLE, np.int16)[rows])


def read_part(content: bytes, slab: Slab, size: int, *, read: list[range] | None = None) -> npt.NDArray[Any]:
    """Decode `slab` of a packed sample; add what is read of it to `read`."""

    def read_bytes(offset: int, length: int) -> bytes:
        if read is not None:
            read.append(range(offset, offset + length))
        return content[offset : offset + length]

    return open_slab(PATH, read_bytes, len(content), SampleSpec(size), slab).decode()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("chunk_voxels", [100, 256, 512, 1000, 3000, 4096])
def test_slabs_are_read_without_the_other_chunks(preset: str, chunk_voxels: int) -> None:
    # Chunks of less than a plane, of one, of two, and of other lengths; with escapes and without.
    for sample in (tiny_sample(6, 16), reference.samples()["all equal"]):
        first_piece, *chunks = encode(sample, preset, chunk_voxels=chunk_voxels)
        content = b"".join((first_piece, *chunks))
        starts = np.cumsum([len(first_piece), *map(len, chunks)]).tolist()
        for slab in slabs(1, 2, 4, 16):
            expected = slab_of(sample.counts, slab)
            read: list[range] = []
            np.testing.assert_array_equal(read_part(content, slab, 16, read=read), expected)
            # Every byte at most once: the chunks with these voxels, and what is before the first chunk.
            voxels = slab_of(np.arange(16**3).reshape(16, 16, 16, 1), slab)[slab.planes(16)[0]]
            needed = set(np.unique(voxels // chunk_voxels).tolist())
            assert sum(map(len, read)) == len(first_piece) + sum(len(chunks[number]) for number in needed)
            for damaged in {0, len(chunks) // 2, len(chunks) - 1}:
                at = starts[damaged]
                broken = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
                # Only its own slabs notice.
                if damaged in needed:
                    with pytest.raises(DataError, match=f"the CRC of chunk {damaged} is wrong") as raised:
                        read_part(broken, slab, 16)
                    assert raised.value.path == str(PATH)
                else:
                    np.testing.assert_array_equal(read_part(broken, slab, 16), expected)


@pytest.mark.parametrize("chunk_voxels", [1, 2, 8])
def test_slabs_of_few_voxels_are_read(chunk_voxels: int) -> None:
    for size in (1, 2):
        sample = tiny_sample(3, size)
        content = b"".join(encode(sample, chunk_voxels=min(chunk_voxels, size**3)))
        for slab in slabs(1, size):
            np.testing.assert_array_equal(read_part(content, slab, size), slab_of(sample.counts, slab))


def test_slabs_of_many_escapes_are_read() -> None:
    rows = np.concatenate(MANY_ROWS)
    counts = np.array(MANY, np.int16)[rows].reshape(10, 10, 10, 4)
    for codecs in ((ZSTD, LZ4, LZ4, ZSTD), (STORED,) * 4):
        for slab in slabs(1, 2, 5, 10):
            np.testing.assert_array_equal(read_part(many(codecs=codecs), slab, 10), slab_of(counts, slab))


def test_a_chunk_with_the_escapes_of_another_is_noticed_in_a_slab() -> None:
    symbols = np.zeros(1000, np.int64)
    symbols[[3, 40, 600, 900]] = 255
    for escapes in ([[0, 7, 1], [1]], [[0], [1, 2, 3]]):
        content = build(MANY, [symbols[:500], symbols[500:]], size=10, escapes=escapes)
        for slab in slabs(1, 2, 5):
            with pytest.raises(DataError, match="escapes"):
                read_part(content, slab, 10)


def test_chunks_that_end_after_the_sample_are_refused() -> None:
    for codec in CODECS:
        # The checksum is that of the bytes that are there.
        start = len(small([0] * 8, codecs=(0, codec), blocks={(0, 0): b""}))
        cut = small([0, 1, 2, 1, 2, 2, 0, 1], codecs=(0, codec))[start:-1]
        content = small([0] * 8, codecs=(0, codec), blocks={(0, 0): cut}, directory={(0, 2): len(cut) + 1})
        with pytest.raises(DataError, match=f"has {len(content)} bytes; its chunks end at"):
            read_part(content, Slab(0, 2, True), 2)


def test_slabs_compare_the_checksums_of_their_chunks() -> None:
    content = small(directory={(1, 0): 5})
    with pytest.raises(DataError, match="the CRC of chunk 1 is wrong"):
        read_part(content, Slab(0, 1, False), 2)


def test_parts_of_a_sample_of_version_2_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"preprocess.convert -i SRC -o DST --to packed") as raised:
        read_part(write_version_2(TABLE, [[0, 1, 2, 1], [2, 2, 0, 1]], size=2), Slab(0, 2, True), 2)
    assert raised.value.key == "parallel.spatial"


@pytest.mark.parametrize(
    "content",
    [
        small(),
        many(codecs=(ZSTD, LZ4, LZ4, ZSTD)),
        write_version_2(TABLE, [[0, 1, 2, 1], [2, 2, 0, 1]], size=2),
    ],
    ids=["small", "many", "version 2"],
)
def test_every_changed_or_missing_byte_is_noticed(content: bytes) -> None:
    damaged = [content[:at] for at in range(len(content))] + [content + b"\0"]
    for at in range(len(content)):
        broken = bytearray(content)
        broken[at] ^= 1 << at % 8
        damaged.append(bytes(broken))
    for each in damaged:
        with pytest.raises(DataError) as raised:
            read(each)
        assert raised.value.path == str(PATH) and "\n" not in str(raised.value)


# The messages that a user meets, by content with valid checksums.
NO_SAMPLE = {
    "is not a packed sample": [b"", b"\x1f\x8b" + bytes(100), b"CFPACKEE" + bytes(100)],
    "is cut off after 6 bytes": [b"CFPACK"],
    "is cut off after 11 bytes": [small()[:11]],
    "is cut off after 67 bytes": [small()[:67]],
    "is cut off: 68 bytes, and its chunks start at": [small()[:68]],
    "version 0, not 2 or 3": [small(version=0)],
    "version 1, not 2 or 3": [small(version=1)],
    "version 4, not 2 or 3": [small(version=4)],
    "bytes; its chunks end at": [
        small(tail=b"\0"),
        small() + b"\0",
        small()[:-1],
        small(directory={(1, 2): 5}),
        small(directory={(1, 2): 2**32 - 1}),
    ],
}
FIELDS = {
    "its header is not valid": [
        *(small(**{name: 0}) for name in ("n", "C", "v", "R", "T")),
        small(n=65536),
        small(n=2**32 - 1),
        small(C=256),
        # A chunk of more voxels than the sample, and than any chunk may have.
        small(v=9),
        build(TABLE, [[0] * ((1 << 20) + 1), [0] * (128**3 - (1 << 20) - 1)], size=128),
        # More rows than voxels.
        small(R=9),
        build(TABLE * 3, [[0] * 8], size=2),
        # A table that is too short for its inflated length.
        small(table_block=bytes(23)),
        small(codecs=(LZ4,), C=64, table_block=bytes(1)),
        small(codecs=(ZSTD,), C=255, R=2, table_block=b""),
        # Codecs that do not exist, and codecs of planes that do not exist.
        *(small(codecs=(0,) * at + (3,)) for at in range(8)),
        *(small(codecs=(0,) * at + (1,)) for at in range(2, 8)),
        *(many(codecs=(0,) * at + (255,)) for at in range(8)),
        *(many(codecs=(0,) * at + (2,)) for at in range(4, 8)),
    ],
    "the CRC of its header is wrong": [small()[:64] + b"\xff" + small()[65:]],
    "the CRC of its chunks is wrong": [small(chunks_crc=7)],
    "the CRC of chunk 1 is wrong": [
        small(directory={(1, 0): 5}, chunks_crc=7),
        small(directory={(1, 0): 5}),
    ],
    "the bytes of its table do not inflate to their 24 bytes": [
        small(table_block=bytes(25)),
        small(codecs=(ZSTD,), table_block=bytes(24)),
        small(codecs=(ZSTD,), table_block=reference.deflate(ZSTD, bytes(23))),
        small(codecs=(LZ4,), table_block=reference.deflate(LZ4, bytes(25))),
    ],
    "a count is -1": [build([[0, 0, 0, -1]], [[0] * 8], size=2)],
    "a count is -32768": [build([*MANY[:-1], [1, 2, -32768, 3]], MANY_ROWS, size=10, codecs=(2,) * 4)],
    "the target is": [small(target=(0, 0, float("nan"), 0)), small(target=(float("inf"), 0, 0, 0))],
}
CHUNKS = {
    "a chunk is too short for its inflated length": [
        small(blocks={(0, 0): bytes(3)}),
        small(blocks={(1, 0): b""}),
        many(codecs=(0, LZ4), blocks={(0, 0): b"\0"}),
        many(codecs=(0, 0, ZSTD), blocks={(0, 1): b""}),
        # More escapes than voxels, or escapes of a sample without them.
        many(directory={(3, 1): 101}),
        many(directory={(0, 1): 2**32 - 1}),
        small(directory={(0, 1): 1}),
    ],
    "the symbols of chunks 0 to 1 do not inflate to their 8 bytes": [
        small(blocks={(1, 0): bytes(5)}),
        small(blocks={(0, 0): bytes(3), (1, 0): bytes(5)}, codecs=(0, ZSTD)),
        small([0, 1, 2, 1, 0], [0, 1, 2], codecs=(0, LZ4), v=4),
        small([0, 1, 2], [0, 1, 2, 1, 0], codecs=(0, ZSTD), v=4),
    ],
    "escapes (byte 1) of chunks 0 to 3 do not inflate": [
        many(blocks={(0, 2): bytes(300)}),
        many(codecs=(0, 0, 0, ZSTD), blocks={(0, 2): bytes(300)}),
    ],
    "a block of the escapes (byte 0) of chunks 0 to 3 should be empty": [many(blocks={(3, 1): b"\0"})],
    "the row 3 of a table of 3 in chunks 0 to 1": [small([0] * 4, [0] * 3 + [3])],
    "the row 255 of a table of 3 in chunks 0 to 1": [small([255] * 4, [0] * 4)],
    "the row 255 of a table of 255 in chunk 0": [build(MANY[:255], [list(range(256)) * 2], size=8)],
    "the row 600 of a table of 600 in chunks 0 to 3": [
        build(MANY, [*MANY_ROWS[:2], [600] * 300, [0] * 100], size=10)
    ],
    "the row 65790 of a table of 600 in chunk 0": [build(MANY, [[65790] * 1000], size=10)],
    "has 1 escapes for 2 symbols in chunk 0": [
        build(MANY, [[255] * 2 + [0] * 998], size=10, escapes=[[0]]),
        build(MANY, [[0] * 998 + [255] * 2], size=10, escapes=[[0]]),
    ],
    "has 2 escapes for 1 symbols in chunk 0": [build(MANY, [[255] + [0] * 999], size=10, escapes=[[0, 0]])],
    "has 1 escapes for 0 symbols in chunk 0": [build(MANY, [[0] * 1000], size=10, escapes=[[0]])],
    "a chunk has the escapes of another one": [
        build(MANY, [[255] * 500, [0] * 500], size=10, escapes=[[9] * 499, [9]]),
        build(MANY, [[255, 0] * 250] * 2, size=10, escapes=[[9] * 251, [9] * 249], codecs=(2,) * 3),
    ],
    "its chunks inflate to other symbols than were packed": [small(symbol_sum=5), many(symbol_sum=0)],
}
VERSION_2 = {
    "version 0, not 2 or 3": [write_version_2(TABLE, [[0] * 8], size=2, version=0)],
    "version 1, not 2 or 3": [write_version_2(TABLE, [[0] * 8], size=2, version=1)],
    "is cut off after 40 bytes": [write_version_2(TABLE, [[0] * 8], size=2)[:40]],
    "its header is not valid": [
        write_version_2(TABLE * 3, [[0] * 8], size=2),
        write_version_2(TABLE, [[0] * 27], size=65536),
        # Two slices of three in a chunk.
        write_version_2(TABLE, [[0] * 18], size=3, slices=2),
        write_version_2(TABLE, [[0] * 27], size=3, slices=4),
    ],
    "bytes; its chunks end at": [write_version_2(TABLE, [[0] * 8], size=2) + b"\0"],
    "its chunks do not inflate to their 8 bytes": [
        write_version_2(TABLE, [[0] * 7], size=2),
        write_version_2(TABLE, [[0] * 8], size=2, lengthen=b"\0"),
    ],
    "a chunk is too short for its inflated length": [write_version_2(TABLE, [[0]], size=9)],
    "a voxel has the row 3 of a table of 3": [write_version_2(TABLE, [[0] * 7 + [3]], size=2)],
    "a voxel has the row 65535 of a table of 3": [
        write_version_2(TABLE, [[0] * 4, [65535] * 4], size=2, planes=2)
    ],
    "a count is -1": [write_version_2([[0, 0, 0, -1]], [[0] * 8], size=2)],
    "the target is": [write_version_2(TABLE, [[0] * 8], size=2, target=(0, 0, float("nan"), 0))],
}
INVALID = [
    pytest.param(message, content, id=f"{message} {number}")
    for group in (NO_SAMPLE, FIELDS, CHUNKS, VERSION_2)
    for message, contents in group.items()
    for number, content in enumerate(contents)
]


@pytest.mark.parametrize(("message", "content"), INVALID)
def test_invalid_content_with_valid_checksums_is_refused(message: str, content: bytes) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        read(content)
    assert raised.value.path == str(PATH) and "\n" not in str(raised.value)


def test_a_target_is_not_looked_at_where_there_is_none() -> None:
    content = small(target=(0, 0, float("nan"), 0))
    assert np.isnan(open_packed(PATH, content, labeled=False).target).all()


def test_a_sample_of_another_shape_is_refused() -> None:
    for spec in (SampleSpec(16), SampleSpec(8, 3)):
        with pytest.raises(DataError, match="the other samples have"):
            read(b"".join(encode(tiny_sample(1, 8))), spec)


def large(codec: int, block: bytes) -> bytes:
    """Return a header that states 101^3 voxels in one chunk, and its `block`."""
    return build(TABLE, [[0] * 101**3], size=101, codecs=(0, codec), blocks={(0, 0): block})


@pytest.mark.parametrize(
    "make",
    [
        # As many voxels as a sample may have, in chunks as long as they may be.
        lambda: small(n=65535, v=1 << 20),
        lambda: small(n=65535, v=1),
        lambda: small(n=40000, v=1 << 20, R=2**32 - 1),
        lambda: build(TABLE, [[0] * 1000], size=10, codecs=(ZSTD,), R=1000, C=255, table_block=bytes(15)),
        lambda: large(LZ4, bytes(101**3 // 255)),
        lambda: large(ZSTD, bytes(101**3 // 32768)),
        lambda: write_version_2(TABLE, [[0]], size=101),
        lambda: write_version_2(TABLE, [[0] * 4000], size=101),
    ],
)  # fmt: skip
def test_a_header_cannot_ask_for_more_memory_than_its_bytes_can_inflate_to(make: Callable[[], bytes]) -> None:
    content = make()
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"too short for its inflated|is cut off|header is not valid"):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", [LZ4, ZSTD])
def test_bytes_that_a_codec_could_inflate_but_do_not_are_refused(codec: int) -> None:
    with pytest.raises(DataError, match=f"the symbols of chunk 0 do not inflate to their {101**3} bytes"):
        read(large(codec, bytes(5000)))


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_version_2_is_read(planes: int, tmp_path: Path) -> None:
    table = np.array(MANY[: 200 if planes == 1 else 500], np.int16)
    rows = np.random.default_rng(planes).integers(0, len(table), (4, 2 * 8 * 8))
    expected = table[rows].reshape(8, 8, 8, 4)
    content = write_version_2(table.tolist(), list(rows), size=8, planes=planes)
    found = read(content, SampleSpec(8))
    np.testing.assert_array_equal(found.counts, expected)
    np.testing.assert_array_equal(found.target, np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    with pytest.raises(DataError, match="the other samples have"):
        read(content, SampleSpec(16))
