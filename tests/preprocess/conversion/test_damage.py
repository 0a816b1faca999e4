"""Damage of every kind on its way through the converter: read because it is legal, or refused by name."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import program, tiny_sample, write_tiny

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.open import open_folder
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.formats.registry import FORMATS
from pipelines.formats.tf_example import encode_example
from pipelines.formats.tfrecord import frame
from pipelines.sample import Sample
from preprocess.conversion.engine import run_conversion
from preprocess.convert import plan_conversion

pytestmark = pytest.mark.usefixtures("inline_workers")

STEM = "universe_0001_000"
SAMPLE = tiny_sample(1)
EXAMPLE = encode_example(SAMPLE)
RECORD = frame(EXAMPLE)
COUNTS_AT = RECORD.index(SAMPLE.counts.tobytes())


def flipped(content: bytes, at: int) -> bytes:
    """`content` with one bit changed at `at`."""
    broken = bytearray(content)
    broken[at] ^= 4
    return bytes(broken)


def with_target(values: list[float]) -> bytes:
    """A sound record of a sample whose target is `values`."""
    return frame(encode_example(Sample(SAMPLE.counts, np.array(values, np.float32))))


def without(feature: bytes) -> bytes:
    """A record with sound CRCs that calls `feature` something else."""
    return frame(EXAMPLE.replace(b"\n\x01" + feature, b"\n\x01q"))


RECORDS: dict[str, tuple[bytes, str | None]] = {
    "the length": (flipped(RECORD, 0), "CRC of the record's length is wrong"),
    "the length's CRC": (flipped(RECORD, 8), "CRC of the record's length is wrong"),
    "the message's head": (flipped(RECORD, 13), "the record's CRC is wrong"),
    "the counts": (flipped(RECORD, COUNTS_AT + 999), "the record's CRC is wrong"),
    "the target": (flipped(RECORD, len(RECORD) - 8), "the record's CRC is wrong"),
    "the record's CRC": (flipped(RECORD, len(RECORD) - 1), "the record's CRC is wrong"),
    "nothing": (b"", "is cut off after 0 bytes"),
    "cut in the length": (RECORD[:5], "is cut off after 5 bytes"),
    "cut behind the length's CRC": (RECORD[:12], "is cut off: 12 bytes of"),
    "cut in the counts": (RECORD[: COUNTS_AT + 100], "is cut off"),
    "cut before the last CRC": (RECORD[:-4], "is cut off"),
    "two records": (RECORD + RECORD, "trailing bytes after its record"),
    "x of odd length": (
        frame(encode_example(Sample(SAMPLE.counts[:, :, 1:], SAMPLE.target))),
        "feature x has",
    ),
    "x is missing": (without(b"x"), "feature x is 0 byte strings"),
    "y is missing": (without(b"y"), "feature y has 0 floats"),
    "y of three": (with_target([0, 0, 0]), "feature y has 3 floats"),
    "y is no number": (with_target([0, float("nan"), 0, 0]), "the target is [0.0, nan"),
    "y is beyond its range": (with_target([0, 1.5, 0, 0]), None),
    # Messages one behind the other are merged: that is protobuf's rule.
    "extra features": (
        frame(EXAMPLE + EXAMPLE.replace(b"\n\x01x", b"\n\x01q").replace(b"\n\x01y", b"\n\x01r")),
        None,
    ),
    "a count below zero": (
        frame(encode_example(Sample(SAMPLE.counts - np.int16(9), SAMPLE.target))),
        "a count is -9",
    ),
}
STREAMS: dict[str, tuple[bytes, str | None]] = {
    "sound": (gzip.compress(RECORD), None),
    "nothing": (b"", "is empty"),
    "the magic": (b"\x1f\x8c" + gzip.compress(RECORD)[2:], "is not gzip, and the other files here are"),
    "a bit of the stream": (flipped(gzip.compress(RECORD), 2000), ""),
    "the stream's CRC": (flipped(gzip.compress(RECORD), len(gzip.compress(RECORD)) - 7), "is damaged"),
    "the stream's length": (flipped(gzip.compress(RECORD), len(gzip.compress(RECORD)) - 3), "is damaged"),
    "cut in the header": (gzip.compress(RECORD)[:6], "is cut off"),
    "cut in the stream": (gzip.compress(RECORD)[:3000], "is cut off"),
    "cut in the trailer": (gzip.compress(RECORD)[:-5], "is cut off"),
    "garbage behind it": (gzip.compress(RECORD) + b"garbage", "7 trailing bytes after the gzip stream"),
    "two members": (gzip.compress(RECORD) * 2, "trailing bytes after the gzip stream"),
    "a stream in a stream": (gzip.compress(gzip.compress(RECORD)), "CRC of the record's length is wrong"),
}


def npy(array: npt.NDArray[Any], old: bytes = b"", new: bytes = b"") -> bytes:
    """`array` as a .npy file, with `old` in its header replaced by `new` of the same length."""
    file = io.BytesIO()
    np.save(file, array)
    assert len(old) == len(new) and old in file.getvalue()
    return file.getvalue().replace(old, new, 1)


def saying(descr: str, shape: str) -> bytes:
    """The counts as a .npy file whose header says this of them."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return npy(SAMPLE.counts)[:10] + header.encode() + SAMPLE.counts.tobytes()


COUNTS, TARGET = SAMPLE.counts, SAMPLE.target
PAIRS: dict[str, tuple[bytes, bytes, str | None]] = {
    "sound": (npy(COUNTS), npy(TARGET), None),
    "a header that says more": (npy(COUNTS, b"(16, 16", b"(17, 17"), npy(TARGET), "its header says"),
    "a header that says less": (npy(COUNTS, b"(16, 16", b"(15, 15"), npy(TARGET), "its header says"),
    "another order of axes": (npy(COUNTS, b"False", b"True "), npy(TARGET), "is in Fortran order"),
    "another type": (npy(COUNTS, b"<i2", b"<f2"), npy(TARGET), "counts are float16"),
    "another byte order": (npy(COUNTS, b"<i2", b">i2"), npy(TARGET), "holds >i2"),
    "pickles": (npy(COUNTS, b"'<i2'", b"'|O' "), npy(TARGET), "holds |O"),
    "another shape": (npy(COUNTS[:8]), npy(TARGET), "counts have shape (8, 16, 16, 4)"),
    "a shape below zero": (saying("'<i2'", "(-16, -16, 16, 4)"), npy(TARGET), "the shape (-16, -16, 16, 4)"),
    "a shape beyond all": (saying("'<i2'", "(4294967296, 4294967296, 1, 1)"), npy(TARGET), "its header says"),
    "no type": (saying("'|S0'", "(16, 16, 16, 4)"), npy(TARGET), "holds |S0"),
    "a type of four": (saying("('<i2', (4,))", "(16, 16, 16)"), npy(TARGET), "holds |V8"),
    "no magic": (b"\x92" + npy(COUNTS)[1:], npy(TARGET), "is not a valid .npy file"),
    "another version": (npy(COUNTS, b"NUMPY\x01", b"NUMPY\x07"), npy(TARGET), "is not a valid .npy file"),
    "cut in the header": (npy(COUNTS)[:60], npy(TARGET), "is not a valid .npy file"),
    "cut in the counts": (npy(COUNTS)[:-1], npy(TARGET), "its header says"),
    "more behind the counts": (npy(COUNTS) + b"x", npy(TARGET), "its header says"),
    "nothing": (b"", npy(TARGET), "is not a valid .npy file"),
}
LABELS: dict[str, tuple[bytes, str | None]] = {
    "of doubles": (npy(TARGET.astype(np.float64)), "the target is float64"),
    "of three": (npy(TARGET[:3]), "of shape (3,)"),
    "no number": (npy(np.full(4, np.inf, np.float32)), "the target is [inf"),
    "cut off": (npy(TARGET)[:-2], "its header says"),
}


def check(folder: Path, target: Path, culprit: Path, said: str | None, legal: Sample | None) -> None:
    """Convert `folder`, in which the sample STEM is `legal` or refused with a line that says `said`."""
    order = plan_conversion(folder, target, "npy")
    done = run_conversion(order, session=Session(World()), workers=1, unit="sample")
    if said is None:
        assert (done.written, done.faults) == (3, ())
        assert legal is not None
        found = open_folder(target).read(1)
        np.testing.assert_array_equal(found.counts, legal.counts)
        np.testing.assert_array_equal(found.target, legal.target)
        return
    (line,) = done.faults
    assert line.startswith(f"{culprit}: ") and said in line and "\n" not in line
    assert done.written == 2 and not (target / f"{STEM}_data.npy").exists()


def folder_of(tmp_path: Path, format_name: str) -> Path:
    """Three sound samples in `format_name`."""
    return write_tiny(tmp_path / "data", train=3, validation=1, format_name=format_name) / "train"


@pytest.mark.parametrize("kind", RECORDS)
def test_records(kind: str, tmp_path: Path) -> None:
    content, said = RECORDS[kind]
    folder = folder_of(tmp_path, "tfrecord")
    (folder / f"{STEM}.tfrecord").write_bytes(content)
    target = np.array([0, 1.5, 0, 0], np.float32) if kind == "y is beyond its range" else TARGET
    check(folder, tmp_path / "npy", folder / f"{STEM}.tfrecord", said, Sample(COUNTS, target))


@pytest.mark.parametrize("kind", STREAMS)
def test_streams(kind: str, tmp_path: Path) -> None:
    content, said = STREAMS[kind]
    folder = folder_of(tmp_path, "tfrecord_gzip")
    (folder / f"{STEM}.tfrecord").write_bytes(content)
    check(folder, tmp_path / "npy", folder / f"{STEM}.tfrecord", said, SAMPLE)


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(kind: str, tmp_path: Path) -> None:
    counts, target, said = PAIRS[kind]
    folder = folder_of(tmp_path, "npy")
    (folder / f"{STEM}_data.npy").write_bytes(counts)
    (folder / f"{STEM}_label.npy").write_bytes(target)
    check(folder, tmp_path / "npy", folder / f"{STEM}_data.npy", said, SAMPLE)


def changed_under_a_manifest(tmp_path: Path, part: str) -> tuple[Path, Path, bytes]:
    """A data set of npy with manifests, a file of which one byte has been changed, and its sound bytes."""
    raw, data = write_tiny(tmp_path / "raw", train=6, validation=1), tmp_path / "data"
    assert program("preprocess.convert", "-i", raw, "-o", data, "--to", "npy").code == 0
    bad = data / "train" / f"{STEM}_{part}.npy"
    whole = bad.read_bytes()
    # Counts and target stay what a sample may have: npy alone does not notice.
    bad.write_bytes(flipped(whole, len(whole) - 4))
    open_folder(data / "train").read(1)
    return data, bad, whole


@pytest.mark.parametrize("part", ["data", "label"])
@pytest.mark.parametrize("to", sorted(FORMATS))
def test_what_npy_does_not_notice_is_found_by_the_manifest(to: str, part: str, tmp_path: Path) -> None:
    data, bad, whole = changed_under_a_manifest(tmp_path, part)
    line = ["-i", data, "-o", tmp_path / "out", "--to", to, "--samples-per-shard", 2, "--workers", 1]
    done = program("preprocess.convert", *line)
    assert done.code == 1 and f"error: {bad}: its CRC-32C is not that in manifest.jsonl; " in done.err
    assert Manifest.load(tmp_path / "out" / "train") is None
    stems = {open_folder(tmp_path / "out" / "train").sample_id(i) for i in range(4)}
    assert STEM not in stems
    bad.write_bytes(whole[:-4])
    said = f"error: {bad}: has {len(whole) - 4} bytes; manifest.jsonl says {len(whole)}; "
    assert said in program("preprocess.convert", *line).err
    bad.write_bytes(whole)
    assert program("preprocess.convert", *line).code == 0
    assert program("preprocess.verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("direct", [[], ["--direct-io"]])
def test_what_npy_does_not_notice_is_not_staged(direct: list[str], tmp_path: Path) -> None:
    data, bad, whole = changed_under_a_manifest(tmp_path, "data")
    line = ["-i", data, "-o", tmp_path / "disk", *direct]
    done = program("preprocess.stage", *line)
    assert done.code == 1 and f"error: {bad}: its CRC-32C is not that in manifest.jsonl; " in done.err
    assert len(open_folder(tmp_path / "disk" / "train")) == 5
    bad.write_bytes(whole)
    assert program("preprocess.stage", *line).code == 0


def test_a_source_that_was_changed_on_purpose_wants_its_manifest_anew(tmp_path: Path) -> None:
    data, bad, _ = changed_under_a_manifest(tmp_path, "data")
    line = ["-i", data / "train", "-o", tmp_path / "out", "--to", "tfrecord"]
    done = program("preprocess.convert", *line)
    assert "remove manifest.jsonl and regenerate it with python -m preprocess.verify --write" in done.err
    (data / "train" / "manifest.jsonl").unlink()
    assert program("preprocess.verify", data / "train", "--write").code == 0
    assert program("preprocess.convert", *line).code == 0
    np.testing.assert_array_equal(open_folder(tmp_path / "out").read(1).counts, np.load(bad))


@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind: str, tmp_path: Path) -> None:
    content, said = LABELS[kind]
    folder = folder_of(tmp_path, "npy")
    (folder / f"{STEM}_label.npy").write_bytes(content)
    check(folder, tmp_path / "npy", folder / f"{STEM}_label.npy", said, SAMPLE)
