"""Formats: samples are read as they were written, TensorFlow's files included, and damage is refused."""

from __future__ import annotations

import bz2
import errno
import gzip
import itertools
import lzma
import os
import random
import stat
import struct
import tempfile
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import crc32c
import numpy as np
import numpy.typing as npt
import pytest
from helpers import DATA, read_sample, slab_of, tiny_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import AccessError, DataError
from pipelines.formats import tfrecord
from pipelines.formats.npy import map_sample, read_slab
from pipelines.formats.registry import FORMATS
from pipelines.sample import Sample, SampleSpec
from pipelines.slab import Slab

Array: TypeAlias = npt.NDArray[Any]


@settings(max_examples=40, deadline=None)
@given(
    format_name=st.sampled_from(sorted(FORMATS)),
    size=st.integers(1, 9),
    channels=st.just(4),
    seed=st.integers(0, 2**32 - 1),
    most=st.sampled_from([1, 3, 255, 256, 32767]),
)
def test_samples_are_read_as_they_were_written(
    format_name: str, size: int, channels: int, seed: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most, (size, size, size, channels), dtype=np.int16, endpoint=True)
    sample = Sample(counts, rng.uniform(-1, 1, 4).astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        written = FORMATS[format_name].write(Path(folder), "universe_000", sample)
        assert {file.path.name for file in written} == {path.name for path in Path(folder).iterdir()}
        found = read_sample(Path(folder) / f"universe_000{FORMATS[format_name].suffix}")
    np.testing.assert_array_equal(found.counts, sample.counts)
    np.testing.assert_array_equal(found.target, sample.target)
    assert found.counts.dtype == np.int16 and found.target.dtype == np.float32


@pytest.mark.parametrize("folder", ["tfrecord_gzip", "tfrecord_plain"])
def test_files_written_by_tensorflow_are_read_exactly(folder: str) -> None:
    with np.load(DATA / "keras_small.npz") as keras:
        counts, targets = keras["counts"], keras["targets"]
    for path, count, target in zip(sorted((DATA / folder).iterdir()), counts, targets, strict=True):
        sample = read_sample(path)
        np.testing.assert_array_equal(sample.counts, count)
        np.testing.assert_array_equal(sample.target, target)


def _masked(data: bytes) -> bytes:
    crc = crc32c.crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _record(example: bytes) -> bytes:
    length = struct.pack("<Q", len(example))
    return length + _masked(length) + example + _masked(example)


def _message(number: int, body: bytes) -> bytes:
    length, varint = len(body), b""
    while length >= 128:
        varint, length = varint + bytes([length % 128 + 128]), length // 128
    return bytes([8 * number + 2]) + varint + bytes([length]) + body


def _example(sample: Sample, *, packed: bool, y_first: bool, extra: bool) -> bytes:
    """Return an Example in a layout that another protobuf writer may choose."""
    floats = [struct.pack("<f", value) for value in sample.target]
    values = _message(1, b"".join(floats)) if packed else b"".join(b"\x0d" + value for value in floats)
    features = {
        b"x": _message(1, _message(1, sample.counts.astype("<i2").tobytes())),
        b"y": _message(2, values),
    }
    if extra:
        features = {b"id": _message(3, _message(1, b"\x05")), **features, b"": _message(1, b"")}
    names = sorted(features, reverse=y_first)
    entries = [_message(1, _message(1, name) + _message(2, features[name])) for name in names]
    return _message(1, b"".join(entries))


def test_any_layout_that_protobuf_allows_is_read(tmp_path: Path) -> None:
    sample = tiny_sample(1)
    path = tmp_path / "a.tfrecord"
    for packed, y_first, extra in itertools.product((True, False), repeat=3):
        path.write_bytes(_record(_example(sample, packed=packed, y_first=y_first, extra=extra)))
        found = read_sample(path)
        np.testing.assert_array_equal(found.counts, sample.counts)
        np.testing.assert_array_equal(found.target, sample.target)


def test_gzip_and_numpy_read_our_files(tmp_path: Path) -> None:
    sample = tiny_sample(2)
    (compressed,) = FORMATS["tfrecord_gzip"].write(tmp_path, "a", sample)
    index, plain = FORMATS["tfrecord"].write(tmp_path, "b", sample)
    record = plain.path.read_bytes()
    assert gzip.decompress(compressed.path.read_bytes()) == record
    assert index.path.name == "b.tfrecord.idx" and index.path.read_text() == f"0 {len(record)}\n"
    FORMATS["npy"].write(tmp_path, "a", sample)
    np.testing.assert_array_equal(np.load(tmp_path / "a_data.npy"), sample.counts)
    np.testing.assert_array_equal(np.load(tmp_path / "a_label.npy"), sample.target)


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_damage_is_refused_or_has_no_effect(format_name: str, tmp_path: Path) -> None:
    sample, rng = tiny_sample(3), random.Random(7)
    FORMATS[format_name].write(tmp_path, "a", sample)
    files = [tmp_path / f"a{part}" for part in FORMATS[format_name].suffixes]
    path = tmp_path / f"a{FORMATS[format_name].suffix}"
    refused = 0
    for _ in range(200):
        victim = rng.choice(files)
        content = victim.read_bytes()
        broken = bytearray(content)
        if rng.random() < 0.4:
            del broken[rng.randrange(len(broken)) :]
        else:
            broken[rng.randrange(min(len(broken), 300))] ^= 1 << rng.randrange(8)
        victim.write_bytes(broken)
        try:
            found = read_sample(path)
        except DataError as error:
            assert error.path == str(victim)
            assert "\n" not in str(error)
            refused += 1
        else:
            # npy has no checksum, and a gzip header has a few bytes without meaning.
            same = np.array_equal(found.counts, sample.counts) and np.array_equal(found.target, sample.target)
            assert same or format_name == "npy"
        victim.write_bytes(content)
    assert refused > (100 if format_name != "npy" else 60)


def _bad_npy(folder: Path, counts: Array | None = None, target: Array | None = None) -> Path:
    sample = tiny_sample(4)
    np.save(folder / "a_data.npy", sample.counts if counts is None else counts)
    np.save(folder / "a_label.npy", sample.target if target is None else target)
    return folder / "a_data.npy"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"counts": np.zeros((16, 16, 16, 4), np.int32)}, "int32"),
        ({"counts": np.zeros((16, 16, 4), np.int16)}, "shape"),
        ({"counts": np.zeros((16, 16, 8, 4), np.int16)}, "shape"),
        ({"counts": np.zeros((8, 8, 8, 4), np.int16)}, "(8, 8, 8, 4)"),
        ({"counts": np.full((16, 16, 16, 4), -1, np.int16)}, "-1"),
        ({"counts": np.asfortranarray(np.zeros((16, 16, 16, 4), np.int16))}, "Fortran"),
        ({"counts": np.zeros((16, 16, 16, 4), ">i2")}, ">i2"),
        ({"counts": np.array([{}], dtype=object)}, "holds"),
        ({"target": np.zeros(3, np.float32)}, "(3,)"),
        ({"target": np.zeros(4)}, "float64"),
        ({"target": np.array([0, 0, np.nan, 0], np.float32)}, "nan"),
        ({"target": np.array([0, 0, np.inf, 0], np.float32)}, "inf"),
    ],
)
def test_an_invalid_npy_is_refused_before_dali_reads_it(
    fault: dict[str, Array], said: str, tmp_path: Path
) -> None:
    path = _bad_npy(tmp_path, **fault)
    dataset = SampleDataset(tmp_path, "npy", (path.name,), SampleSpec(16))
    for use in (dataset.read, dataset.payload, partial(dataset.payload, slab=Slab(0, 2, True))):
        if use == dataset.payload and said == "-1":
            continue  # becomes NaN in DALI, and the trainer then reads the sample again
        with pytest.raises(DataError) as raised:
            use(0)
        assert said in str(raised.value) and raised.value.path.startswith(str(tmp_path / "a_"))


def test_slabs_of_an_npy_are_read_behind_a_header_of_any_length(tmp_path: Path) -> None:
    sample, path, slab = tiny_sample(4), _bad_npy(tmp_path), Slab(1, 2, True)
    content = path.read_bytes()
    for length in (118, 119, 501, 4000):
        header = content[10:127].ljust(length - 1) + b"\n"
        whole = content[:8] + length.to_bytes(2, "little") + header + content[128:]
        path.write_bytes(whole)
        for direct in (False, True):
            found = read_slab(path, SampleSpec(16), slab, direct=direct)
            np.testing.assert_array_equal(found.counts, slab_of(sample.counts, slab))
            np.testing.assert_array_equal(found.target, sample.target)
        for cut in (5, length, length + 10, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError) as raised:
                read_slab(path, SampleSpec(16), slab)
            assert raised.value.path == str(path)
    path.unlink()
    with pytest.raises(AccessError):
        read_slab(path, SampleSpec(16), slab)


def test_no_file_of_a_sample_stays_open(tmp_path: Path) -> None:
    # There may be half a million.
    path = _bad_npy(tmp_path)
    read_slab(path, SampleSpec(16), Slab(0, 2, True))
    assert path.resolve() not in [link.resolve() for link in Path("/proc/self/fd").iterdir()]


def test_files_of_other_than_one_record_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    record = _record(_example(tiny_sample(5), packed=True, y_first=False, extra=False))
    for content, said in (
        (record + record, "more than one record"),
        (record + b"\0", "1 trailing bytes after its record"),
        (gzip.compress(record) + gzip.compress(record), "more than one record"),
        (gzip.compress(record)[:-4], "cut off"),
        (zlib.compress(record), "ZLIB"),
        (gzip.compress(zlib.compress(record)), "ZLIB"),
        (_record(b"\xff\xff\xff"), "not a tf.train.Example"),
        (_record(b""), "feature x"),
        (_record(_message(1, b"")), "feature x"),
        (b"", "cut off"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_sample(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    for format_name in FORMATS.values():
        with pytest.raises(AccessError, match="No space"):
            format_name.write(tmp_path, "a", tiny_sample(6))
    assert list(tmp_path.iterdir()) == []


def test_headers_are_read_by_many_threads(tmp_path: Path) -> None:
    # Python's parser, which reads the headers, is not thread-safe: each shape here is parsed again.
    sizes = range(1, 33)
    for size in sizes:
        np.save(tmp_path / f"{size}_data.npy", np.zeros((size, size, size, 4), np.int16))
        np.save(tmp_path / f"{size}_label.npy", np.zeros(4, np.float32))

    def size_of(size: int) -> int:
        return int(map_sample(tmp_path / f"{size}_data.npy", SampleSpec(size)).counts.shape[0])

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(size_of, sizes)) == list(sizes)


def test_a_record_is_not_written_with_other_than_four_channels(tmp_path: Path) -> None:
    sample = Sample(np.zeros((8, 8, 8, 32), np.int16), tiny_sample(1).target)
    for format_name in ("tfrecord", "tfrecord_gzip"):
        with pytest.raises(DataError, match="cannot hold 32 channels: a TFRecord has 4; use npy or packed"):
            FORMATS[format_name].write(tmp_path, "a", sample)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("without", [False, True])
def test_one_gzip_member_is_read_and_trailing_bytes_are_refused(
    without: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without:
        monkeypatch.setattr(tfrecord, "deflate", None)
    # Uncompressed counts whose bytes look like the beginning of a gzip member.
    counts = tiny_sample(5).counts
    counts[1, 2, 3, :3] = np.frombuffer(b"\x00\x1f\x8b\x08\x00\x01", "<i2")
    record = _record(_example(Sample(counts, tiny_sample(5).target), packed=True, y_first=False, extra=False))
    path = tmp_path / "a.tfrecord"
    for level in (0, 6):
        member = gzip.compress(record, level, mtime=7)
        assert (b"\x1f\x8b\x08\x00" in member[1:]) == (level == 0)
        path.write_bytes(member)
        np.testing.assert_array_equal(read_sample(path).counts, counts)
        same_length = b"????" + member[-4:]
        for more in (b"\0", bytes(512), member[:1], member[-8:], b"\0" + member[-8:], same_length):
            path.write_bytes(member + more)
            with pytest.raises(DataError, match=f"{len(more)} trailing bytes behind the gzip stream"):
                read_sample(path)
        for damaged in (member[:-8] + b"????" + member[-4:], member[:-4] + b"????", member[:-9], member[:40]):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="gzip stream is"):
                read_sample(path)


@pytest.mark.parametrize("without", [False, True])
def test_gzip_members_are_read_as_one_stream(
    without: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without:
        monkeypatch.setattr(tfrecord, "deflate", None)
    sample = tiny_sample(5)
    record = _record(_example(sample, packed=True, y_first=False, extra=False))
    path, dataset = (
        tmp_path / "a.tfrecord",
        SampleDataset(tmp_path, "tfrecord_gzip", ("a.tfrecord",), SampleSpec(16)),
    )
    empty, half = gzip.compress(b""), len(record) // 2
    halves = [gzip.compress(record[:half]), gzip.compress(record[half:], 0)]
    pieces = [gzip.compress(record[at : at + 99]) for at in range(0, len(record), 99)]
    # The last member states the length of the first, and of all of them.
    for members in (
        halves,
        pieces,
        [empty, *halves],
        [*halves, empty],
        [gzip.compress(record), empty, empty],
    ):
        path.write_bytes(b"".join(members))
        np.testing.assert_array_equal(dataset.read(0).counts, sample.counts)
    for content, said in (
        (halves[0] + halves[1][:-20], "cut off"),
        (halves[0] + halves[1][:5], "cut off"),
        (halves[0] + b"\x1f\x8bgarbage", "damaged"),
        (halves[0] + halves[1] + bytes(512), "512 trailing bytes behind"),
        (halves[0] + halves[1][:-5] + b"?" + halves[1][-4:], "damaged"),
        (gzip.compress(record) + gzip.compress(bytes(8 << 20)), "inflates to more"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said) as raised:
            dataset.read(0)
        assert raised.value.path == str(path)
    path.write_bytes(gzip.compress(b"") * 20000 + halves[0] + halves[1])
    np.testing.assert_array_equal(dataset.read(0).counts, sample.counts)


OTHER_CONTENT = {
    "HTML": b"\xef\xbb\xbf\n<!DOCTYPE html><html><body>404</body></html>",
    "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "JSON": b'{"message": "rate limit exceeded"}',
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "Zstandard": b"\x28\xb5\x2f\xfd" + bytes(range(200)),
    "xz": lzma.compress(bytes(1000)),
    "bzip2": bz2.compress(bytes(1000)),
    "zip": b"PK\x03\x04" + bytes(range(100)),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "zeros": bytes(4096),
    "text": b"Login required.\n",
}


@pytest.mark.parametrize("name", ["a.tfrecord", "a_data.npy", "a_label.npy", "a.tar"])
def test_what_is_no_sample_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    _bad_npy(tmp_path)
    suffix = name.removeprefix("a")
    path = tmp_path / name
    for phrase, content in OTHER_CONTENT.items():
        path.write_bytes(content)
        with pytest.raises(DataError) as raised:
            read_sample(tmp_path / "a_data.npy" if suffix == "_label.npy" else path)
        if (suffix, phrase) != (".tar", "zeros"):  # an empty tar archive
            assert phrase in raised.value.fault
        assert raised.value.path == str(path)
    if suffix == ".tfrecord":
        gzip_set = SampleDataset(tmp_path, "tfrecord_gzip", (name,), SampleSpec(16))
        for phrase, content in OTHER_CONTENT.items():
            path.write_bytes(content)
            with pytest.raises(DataError, match=phrase):
                gzip_set.read(0)


@pytest.mark.parametrize("stated", [0, 1, 64 << 20, 2**32 - 1])
def test_a_gzip_bomb_is_not_inflated(stated: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    path.write_bytes(gzip.compress(bytes(64 << 20), 1)[:-4] + struct.pack("<I", stated))
    tracemalloc.start()
    with pytest.raises(DataError, match="inflates to more than the 32768 bytes of a sample"):
        SampleDataset(tmp_path, "tfrecord_gzip", (path.name,), SampleSpec(16)).read(0)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_failed_sync_of_the_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def fail_on_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    with pytest.raises(AccessError, match=r"cannot be synced to the disk \(Input/output error\)") as raised:
        FORMATS["npy"].write(tmp_path, "a", tiny_sample(1))
    assert raised.value.path == str(tmp_path)


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_a_large_sample_is_read_as_it_was_written(format_name: str, tmp_path: Path) -> None:
    # Files of more than 1 MiB bypass the page cache.
    sample = tiny_sample(1, size=80)
    written = FORMATS[format_name].write(tmp_path, "a", sample)
    for file in written:
        assert (len(content := file.path.read_bytes()), crc32c.crc32c(content)) == (file.bytes, file.crc32c)
    found = read_sample(tmp_path / f"a{FORMATS[format_name].suffix}")
    np.testing.assert_array_equal(found.counts, sample.counts)
    np.testing.assert_array_equal(found.target, sample.target)
