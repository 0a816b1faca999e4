"""Randomly damaged files: the readers refuse them, or read what independent decoders read.

The oracles are Python's gzip and tarfile, numpy.load, Google's protobuf with TensorFlow's message
types, and `reference_packed_reader`. Lists and manifests must not change when written and read again.
TFRecords, packed samples and tar headers get valid checksums around the damage, so that it reaches the
parsers. FUZZ_SECONDS sets the time for each kind of file; 3 in `make test-all`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import crc32c
import h5py
import numpy as np
import pytest
import reference_packed_reader as reference
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from helpers import framed, read_sample, slab_of, slabs, tiny_sample

from pipelines.dataset.file_lists import ListedFile, read_list, write_list
from pipelines.dataset.manifest import MANIFEST, Entry, Manifest
from pipelines.dataset.open import open_folder
from pipelines.errors import ConfigError, DataError
from pipelines.filesystem import is_hidden
from pipelines.formats.packed.decode import open_packed, open_slab
from pipelines.formats.packed.encode import PRESETS, encode
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import read_members, write_shard
from pipelines.formats.registry import FORMATS
from pipelines.formats.tf_example import encode_example
from pipelines.sample import Sample, SampleSpec
from pipelines.storage.local import clear_open_files
from preprocess.conversion.hdf5_task import crops, universe_shape

SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
MIN_FILES = 1500
"""Files of each kind on a slow machine too: enough for the counts that the tests require."""


def example_type() -> type[message.Message]:
    """Return tensorflow.Example as defined by tensorflow/core/example/{example,feature}.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def add(name: str, *fields: tuple[str, int, int, str]) -> descriptor_pb2.DescriptorProto:
        made = file.message_type.add(name=name)
        for field, number, kind, type_name in fields:
            repeated = (field == "value" and name.endswith("List")) or type_name.endswith("Entry")
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=kind, label=label, type_name=type_name or None)
        return made

    add("BytesList", ("value", 1, kinds.TYPE_BYTES, ""))
    add("FloatList", ("value", 1, kinds.TYPE_FLOAT, ""))
    add("Int64List", ("value", 1, kinds.TYPE_INT64, ""))
    feature = add(
        "Feature",
        ("bytes_list", 1, kinds.TYPE_MESSAGE, ".tensorflow.BytesList"),
        ("float_list", 2, kinds.TYPE_MESSAGE, ".tensorflow.FloatList"),
        ("int64_list", 3, kinds.TYPE_MESSAGE, ".tensorflow.Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = add("Features", ("feature", 1, kinds.TYPE_MESSAGE, ".tensorflow.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    label, kind = kinds.LABEL_OPTIONAL, kinds.TYPE_MESSAGE
    entry.field.add(name="value", number=2, type=kind, label=label, type_name=".tensorflow.Feature")
    add("Example", ("features", 1, kinds.TYPE_MESSAGE, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


EXAMPLE = example_type()


def mutated(data: bytes, chance: random.Random, near: int) -> bytes:
    """Return `data` with one to three damages, mostly within `near` bytes of its ends."""
    broken = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        if not broken:
            break
        at = chance.randrange(len(broken))
        if chance.random() < 0.8:
            at = min(at, chance.randrange(near)) if chance.random() < 0.5 else max(at, len(broken) - near)
        match chance.randrange(6):
            case 0:
                broken[at] ^= 1 << chance.randrange(8)
            case 1:
                broken[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
            case 2:
                del broken[at : at + chance.choice([1, 2, 4, 8, 1000])]
            case 3:
                broken[at:at] = chance.randbytes(chance.choice([1, 2, 4, 8, 1000]))
            case 4:
                del broken[at:]
            case 5:
                other = chance.randrange(len(broken))
                broken[at : at + 16] = broken[other : other + 16]
    return bytes(broken)


def by_protobuf(record: bytes) -> Sample:
    """Return the sample that Google's decoder finds in `record`; raise if there is none."""
    example = EXAMPLE.FromString(record)
    features = example.features.feature
    (counts,), target = features["x"].bytes_list.value, features["y"].float_list.value
    size = round((len(counts) / 8) ** (1 / 3))
    return Sample(
        np.frombuffer(counts, "<i2").reshape(size, size, size, 4), np.array(target, np.float32).reshape(4)
    )


def by_numpy(data: bytes, label: bytes) -> Sample:
    """Return the sample that numpy.load reads."""
    return Sample(*(np.load(io.BytesIO(content), allow_pickle=False) for content in (data, label)))


def fuzz(
    path: Path,
    write: Callable[[random.Random], Callable[[], Sample]],
    *,
    seconds: float = SECONDS,
    files: int = MIN_FILES,
) -> tuple[int, int]:
    """Write files with `write` and read `path`, for `seconds` and until there were `files`.

    Returns:
        How many were read, and how many were refused.
    """
    chance, read, refused = random.Random(11), 0, 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or read + refused < files:
        oracle = write(chance)
        start = time.monotonic()
        try:
            found = read_sample(path)
        except DataError as error:
            assert str(path.parent) in str(error) and "\n" not in str(error)
            refused += 1
            continue
        finally:
            assert time.monotonic() - start < 5, "reading a damaged file took too long"
        expected = oracle()
        np.testing.assert_array_equal(found.counts, expected.counts)
        np.testing.assert_array_equal(found.target, expected.target)
        read += 1
    return read, refused


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_records_with_sound_crcs(tmp_path: Path) -> None:
    original, path = b"".join(encode_example(tiny_sample(1, size=2))), tmp_path / "a.tfrecord"

    def write(chance: random.Random) -> Callable[[], Sample]:
        record = mutated(original, chance, near=32)
        path.write_bytes(framed(record))
        return lambda: by_protobuf(record)

    read, refused = fuzz(path, write)
    # Damage in the counts leaves a valid record, damage around them mostly does not.
    assert read > 20 and refused > 20


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_containers(tmp_path: Path) -> None:
    original, path = framed(*encode_example(tiny_sample(1, size=2))), tmp_path / "a.tfrecord"

    def write(chance: random.Random) -> Callable[[], Sample]:
        content = mutated(original, chance, near=16)
        path.write_bytes(content)

        def oracle() -> Sample:
            assert content == original, "a wrong CRC was accepted"
            return by_protobuf(content[12:-4])

        return oracle

    assert fuzz(path, write)[1] > 20


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_gzip_streams(tmp_path: Path) -> None:
    original, path = (
        gzip.compress(framed(*encode_example(tiny_sample(1, size=2)))),
        tmp_path / "gzip.tfrecord",
    )

    def write(chance: random.Random) -> Callable[[], Sample]:
        content = mutated(original, chance, near=12)
        if chance.random() < 0.2 and len(content) > 18:
            # With a matching trailer, so that the record is parsed.
            inflated = zlib.decompressobj(-15).decompress(original[10:])
            cut = chance.randrange(len(inflated))
            content = gzip.compress(inflated[:cut] + inflated[cut + 1 :])
        elif chance.random() < 0.2:
            # With a wrong length in the trailer.
            content = original[:-4] + struct.pack(
                "<I", chance.choice([0, 1, 2**31, 2**32 - 1, chance.randrange(2**20)])
            )
        path.write_bytes(content)
        return lambda: by_protobuf(gzip.decompress(content)[12:-4])

    assert fuzz(path, write)[1] > 20


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_npy_pairs(tmp_path: Path) -> None:
    path, label = tmp_path / "a_data.npy", tmp_path / "a_label.npy"
    FORMATS["npy"].write(tmp_path, "a", tiny_sample(1, size=2))
    original = path.read_bytes(), label.read_bytes()

    def write(chance: random.Random) -> Callable[[], Sample]:
        data, target = original
        if chance.random() < 0.7:
            data = mutated(data, chance, near=128)
        else:
            target = mutated(target, chance, near=128)
        path.write_bytes(data)
        label.write_bytes(target)
        return lambda: by_numpy(data, target)

    read, refused = fuzz(path, write)
    assert read > 20 and refused > 20


def damaged_inside(original: bytes, chance: random.Random) -> bytes:
    """Return the packed sample `original` with a damage and valid checksums around it."""
    if chance.random() < 0.5:
        return with_checksums(mutated(original, chance, near=200))
    # One of the numbers in the header and the directory.
    at = chance.randrange(8, 160, 4) % (len(original) - 3)
    (number,) = struct.unpack_from("<I", original, at)
    near = [number - 1, number + 1, 2 * number, number // 2, chance.randrange(1024)]
    number = chance.choice([*near, 0, 255, 256, 257, 65535, 65536, 2**31, 2**32 - 1])
    changed = struct.pack("<I", number % 2**32)
    return with_checksums(original[:at] + changed + original[at + 4 :])


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    ("seconds", "files"), [(0, 200), pytest.param(2 * SECONDS, 2 * MIN_FILES, marks=pytest.mark.slow)]
)
def test_packed_samples_with_sound_checksums(seconds: float, files: int, tmp_path: Path) -> None:
    path, samples = tmp_path / "a.tar", reference.samples()
    originals = [
        *(b"".join(encode(samples["512 different"], preset, chunk_voxels=100)) for preset in PRESETS),
        *(b"".join(encode(tiny_sample(1, size=4), preset, chunk_voxels=30)) for preset in PRESETS),
        reference.write(reference.TABLE, [[0, 1, 2, 2]] * 2, size=2, codecs=(reference.LZ4,) * 2),
    ]

    def write(chance: random.Random) -> Callable[[], Sample]:
        content = damaged_inside(chance.choice(originals), chance)
        write_shard(path, [(f"a{MEMBER_SUFFIX}", [content])])
        clear_open_files()
        return lambda: Sample(*reference.read(content))

    read, refused = fuzz(path, write, seconds=seconds, files=files)
    assert read > 20 and refused > 20


def test_slabs_of_packed_samples_with_sound_checksums() -> None:
    chance, path, read, refused = random.Random(13), Path("a.tar/a.packed"), 0, 0
    originals = [
        (len(sample.counts), b"".join(encode(sample, preset, chunk_voxels=chunk_voxels)))
        for preset in PRESETS
        for sample, chunk_voxels in (
            (reference.samples()["512 different"], 100),
            (tiny_sample(1, size=4), 30),
        )
    ]
    while read + refused < 600:
        size, original = chance.choice(originals)
        content, slab = damaged_inside(original, chance), chance.choice(slabs(1, 2, 4))
        try:
            found = open_slab(path, partial(part_of, content), len(content), SampleSpec(size), slab).decode()
        except ConfigError:
            # No part of version 2 can be read.
            assert content[8] == 2
            continue
        except DataError:
            with pytest.raises(DataError):
                open_packed(path, content, SampleSpec(size)).decode()
            refused += 1
            continue
        assert found.shape == slab.shape(SampleSpec(size))
        read += 1
        with contextlib.suppress(DataError):  # The damage may be outside the slab.
            whole = open_packed(path, content).decode()
            np.testing.assert_array_equal(found, slab_of(whole, slab))
    assert read > 20 and refused > 20


def part_of(content: bytes, offset: int, length: int) -> bytes:
    """Return `length` bytes of `content`."""
    assert offset >= 0 and length >= 0 and offset + length <= len(content)
    return content[offset : offset + length]


def repeat(attempt: Callable[[random.Random], None]) -> tuple[int, int]:
    """Call `attempt` for SECONDS; return how often it passed and how often it refused."""
    chance, well, refused = random.Random(12), 0, 0
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline or well + refused < MIN_FILES:
        start = time.monotonic()
        try:
            attempt(chance)
            well += 1
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
        assert time.monotonic() - start < 5, "reading a damaged file took too long"
    return well, refused


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_tar_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [(f"{name}{MEMBER_SUFFIX}", [bytes(700)]) for name in "abc"])
    original = path.read_bytes()

    def attempt(chance: random.Random) -> None:
        content = bytearray(original)
        at = chance.choice([0, 1536, 3072])
        header = mutated(original[at : at + 512], chance, near=512)[:512].ljust(512, b"\0")
        if chance.random() < 0.3:
            # A length in base 256, of either sign.
            header = header[:124] + chance.choice([b"\x80", b"\xff"]) + chance.randbytes(11) + header[136:]
        content[at : at + 512] = header
        content[at + 148 : at + 156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        path.write_bytes(content)
        found = read_members(path)
        assert all(0 < member.offset <= member.offset + member.bytes <= len(content) for member in found)
        with tarfile.open(path) as tar:
            expected = tar.getmembers()
        if all(member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) for member in expected):
            visible = [member for member in expected if not is_hidden(member.name)]
            assert list(found) == [(member.name, member.offset_data, member.size) for member in visible]

    well, refused = repeat(attempt)
    assert well > 20 and refused > 20


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_lists(tmp_path: Path) -> None:
    path, again = tmp_path / "files_data.lst", tmp_path / "again.lst"
    write_list(path, [ListedFile(f"a {index}.tfrecord", 7 * index) for index in range(9)])
    original = path.read_bytes()

    def attempt(chance: random.Random) -> None:
        path.write_bytes(mutated(original, chance, near=64))
        found = read_list(path)
        assert all(entry.name for entry in found)
        write_list(again, found)
        assert read_list(again) == found

    # Almost any text is a valid name in a list.
    well, refused = repeat(attempt)
    assert well > 20 and refused > 0


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("format_name", ["npy", "packed"])
def test_manifests(format_name: str, tmp_path: Path) -> None:
    folder, again = tmp_path / "folder", tmp_path / "again"
    folder.mkdir()
    again.mkdir()
    entries = [
        Entry.from_written(
            f"u{index}", FORMATS[format_name].write(folder, f"u{index}", tiny_sample(index, size=2))
        )
        for index in range(3)
    ]
    Manifest(format_name, SampleSpec(2), tuple(entries)).save(folder)
    original = (folder / MANIFEST).read_bytes()

    def attempt(chance: random.Random) -> None:
        (folder / MANIFEST).write_bytes(mutated(original, chance, near=120))
        found = Manifest.load(folder)
        assert found is not None
        found.save(again)
        assert Manifest.load(again) == found
        split = open_folder(folder)
        for index in range(len(split)):
            with contextlib.suppress(DataError):
                # A sample, or DataError: the manifest may name another file.
                split.read(index)

    well, refused = repeat(attempt)
    assert well > 20 and refused > 20


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_universes(tmp_path: Path) -> None:
    path, size = tmp_path / "u.hdf5", 4
    with h5py.File(path, "w") as file:
        file["full"], file["unitPar"] = np.ones((size, size, size, 4), np.int16), np.zeros(4)
    original = path.read_bytes()
    assert len(original) < 4096

    def attempt(chance: random.Random) -> None:
        path.write_bytes(mutated(original, chance, near=len(original)))
        universe_shape(path)
        # The shape that `prepare` has found in the first universe.
        (sample,) = crops(path, (size, size, size, 4), size)
        assert sample.counts.shape == (size, size, size, 4) and sample.counts.min() >= 0

    well, refused = repeat(attempt)
    assert well > 20 and refused > 20


def with_checksums(content: bytes) -> bytes:
    """Return the packed sample `content` with the checksums that its header requires."""
    fixed = bytearray(content)
    if len(content) < 68:
        return content
    size, _, chunk_voxels, rows, table_bytes = struct.unpack_from("<5I", content, 12)
    columns = 2 + reference.planes_of(rows)
    chunks = -(-(size**3) // max(1, chunk_voxels))
    chunks_start = 68 + 4 * columns * chunks + table_bytes
    if chunks_start > len(content):
        return content
    start, symbol_sum, voxels = chunks_start, 0, size**3
    for at in range(68, 68 + 4 * columns * chunks, 4 * columns):
        lengths = struct.unpack_from(f"<{columns - 2}I", content, at + 8)
        symbols, end = content[start : start + lengths[0]], start + sum(lengths)
        with contextlib.suppress(Exception):
            symbol_sum += int(reference.inflate(content[33], symbols, min(chunk_voxels, voxels)).sum())
        struct.pack_into("<I", fixed, at, crc32c.crc32c(content[start:end]))
        start, voxels = end, voxels - chunk_voxels
    struct.pack_into("<I", fixed, 56, crc32c.crc32c(content[chunks_start:]))
    struct.pack_into("<I", fixed, 64, symbol_sum % 2**32)
    covered = bytes(fixed[:60]) + bytes(fixed[64:chunks_start])
    struct.pack_into("<I", fixed, 60, crc32c.crc32c(covered))
    return bytes(fixed)
