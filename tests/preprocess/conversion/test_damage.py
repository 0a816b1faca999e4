"""Damage of every kind in the source of a conversion: converted if it is legal, or reported by name."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import framed, program, read_sample, tiny_sample, write_tiny

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.open import open_folder
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.formats.registry import FORMATS
from pipelines.formats.tf_example import encode_example
from pipelines.sample import Sample
from preprocess.conversion.engine import run_conversion
from preprocess.convert import plan_conversion

pytestmark = pytest.mark.usefixtures("inline_workers")

STEM = "universe_0001_000"
SAMPLE = tiny_sample(1)
EXAMPLE = b"".join(encode_example(SAMPLE))
RECORD = framed(EXAMPLE)
COUNTS_AT = RECORD.index(SAMPLE.counts.tobytes())


def flipped(content: bytes, at: int) -> bytes:
    """`content` with one bit changed at `at`."""
    broken = bytearray(content)
    broken[at] ^= 4
    return bytes(broken)


def with_target(values: list[float]) -> bytes:
    """A sound record of a sample whose target is `values`."""
    return framed(*encode_example(Sample(SAMPLE.counts, np.array(values, np.float32))))


def without(feature: bytes) -> bytes:
    """A record with sound CRCs that calls `feature` something else."""
    return framed(EXAMPLE.replace(b"\n\x01" + feature, b"\n\x01q"))


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
    "two records": (RECORD + RECORD, "holds more than one record"),
    "x of odd length": (
        framed(*encode_example(Sample(SAMPLE.counts[:, :, 1:], SAMPLE.target))),
        "feature x has",
    ),
    "x is missing": (without(b"x"), "feature x is 0 byte strings"),
    "y is missing": (without(b"y"), "feature y has 0 floats"),
    "y of three": (with_target([0, 0, 0]), "feature y has 3 floats"),
    "y is no number": (with_target([0, float("nan"), 0, 0]), "the target is [0.0, nan"),
    "y is beyond its range": (with_target([0, 1.5, 0, 0]), None),
    # Messages one behind the other are merged: that is protobuf's rule.
    "extra features": (
        framed(EXAMPLE + EXAMPLE.replace(b"\n\x01x", b"\n\x01q").replace(b"\n\x01y", b"\n\x01r")),
        None,
    ),
    "a count below zero": (
        framed(*encode_example(Sample(SAMPLE.counts - np.int16(9), SAMPLE.target))),
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
    "garbage behind it": (gzip.compress(RECORD) + b"garbage", "7 trailing bytes behind the gzip stream"),
    "two members": (gzip.compress(RECORD) * 2, "holds more than one record"),
    "a stream in a stream": (gzip.compress(gzip.compress(RECORD)), "holds gzip data instead of a TFRecord"),
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


def check(folder: Path, suffix: str, faults: dict[str, str | None], legal: dict[str, Sample]) -> None:
    """Convert `folder` to npy: each sample with a fault is named with it, and all others are converted.

    faults: text in the line of each sample, by its ID; None for a legal one.
    suffix: that of the file which the line names.
    legal: the content of legal samples, if it is not SAMPLE.
    """
    target = folder.with_name("npy")
    plan = plan_conversion(folder, target, "npy")
    report = run_conversion(plan, session=Session(World()), workers=1, unit="sample")
    lines = {line.partition(": ")[0]: line for line in report.faults}
    assert len(lines) == len(report.faults) == sum(fault is not None for fault in faults.values())
    for sample_id, fault in faults.items():
        if fault is None:
            found, expected = read_sample(target / f"{sample_id}_data.npy"), legal.get(sample_id, SAMPLE)
            np.testing.assert_array_equal(found.counts, expected.counts)
            np.testing.assert_array_equal(found.target, expected.target)
        else:
            line = lines[str(folder / (sample_id + suffix))]
            assert fault in line and "\n" not in line, sample_id
            assert not (target / f"{sample_id}_data.npy").exists()


def named(kinds: Iterable[str]) -> dict[str, str]:
    """Return a sample ID for each kind of damage; those that `sound_folder` writes come first."""
    return {kind: f"x_{kind.replace(' ', '_')}" for kind in kinds}


def sound_folder(tmp_path: Path, format_name: str) -> Path:
    """Return a folder with one sound sample in `format_name`."""
    return write_tiny(tmp_path / "data", train=1, validation=1, format_name=format_name) / "train"


def test_records(tmp_path: Path) -> None:
    folder, ids = sound_folder(tmp_path, "tfrecord"), named(RECORDS)
    for kind, (content, _) in RECORDS.items():
        (folder / f"{ids[kind]}.tfrecord").write_bytes(content)
    beyond = Sample(COUNTS, np.array([0, 1.5, 0, 0], np.float32))
    legal = {ids["y is beyond its range"]: beyond}
    check(folder, ".tfrecord", {ids[kind]: fault for kind, (_, fault) in RECORDS.items()}, legal)


def test_streams(tmp_path: Path) -> None:
    folder, ids = sound_folder(tmp_path, "tfrecord_gzip"), named(STREAMS)
    for kind, (content, _) in STREAMS.items():
        (folder / f"{ids[kind]}.tfrecord").write_bytes(content)
    check(folder, ".tfrecord", {ids[kind]: fault for kind, (_, fault) in STREAMS.items()}, {})


def test_pairs(tmp_path: Path) -> None:
    folder, ids = sound_folder(tmp_path, "npy"), named(PAIRS)
    for kind, (counts, target, _) in PAIRS.items():
        (folder / f"{ids[kind]}_data.npy").write_bytes(counts)
        (folder / f"{ids[kind]}_label.npy").write_bytes(target)
    check(folder, "_data.npy", {ids[kind]: fault for kind, (_, _, fault) in PAIRS.items()}, {})


def test_labels(tmp_path: Path) -> None:
    folder, ids = sound_folder(tmp_path, "npy"), named(LABELS)
    for kind, (target, _) in LABELS.items():
        (folder / f"{ids[kind]}_data.npy").write_bytes(npy(COUNTS))
        (folder / f"{ids[kind]}_label.npy").write_bytes(target)
    check(folder, "_label.npy", {ids[kind]: fault for kind, (_, fault) in LABELS.items()}, {})


def changed_under_a_manifest(tmp_path: Path, part: str) -> tuple[Path, Path, bytes]:
    """Return a data set of npy with manifests, a file of it with one changed byte, and its sound bytes."""
    raw, data = write_tiny(tmp_path / "raw", train=6, validation=1), tmp_path / "data"
    assert program("preprocess.convert", "-i", raw, "-o", data, "--to", "npy").code == 0
    bad = data / "train" / f"{STEM}_{part}.npy"
    whole = bad.read_bytes()
    # Counts and target stay valid: the format alone does not show the damage.
    bad.write_bytes(flipped(whole, len(whole) - 4))
    open_folder(data / "train").read(1)
    return data, bad, whole


@pytest.mark.parametrize("to", sorted(FORMATS))
def test_damage_that_only_the_manifest_shows_is_not_converted(to: str, tmp_path: Path) -> None:
    for part in ("data", "label"):
        data, bad, sound = changed_under_a_manifest(tmp_path / part, part)
        target = tmp_path / part / "out"
        line = ["-i", data, "-o", target, "--to", to, "--samples-per-shard", 2]
        done = program("preprocess.convert", *line)
        assert done.code == 1 and f"error: {bad}: its CRC-32C is not that in manifest.jsonl; " in done.err
        assert Manifest.load(target / "train") is None
        converted = open_folder(target / "train")
        assert STEM not in {converted.sample_id(index) for index in range(len(converted))}
        bad.write_bytes(sound[:-4])
        fault = f"error: {bad}: has {len(sound) - 4} bytes; manifest.jsonl says {len(sound)}; "
        assert fault in program("preprocess.convert", *line).err
        bad.write_bytes(sound)
        assert program("preprocess.convert", *line).code == 0
        assert program("preprocess.verify", target).code == 0


@pytest.mark.parametrize("direct", [[], ["--direct-io"]])
def test_damage_that_only_the_manifest_shows_is_not_staged(direct: list[str], tmp_path: Path) -> None:
    data, bad, whole = changed_under_a_manifest(tmp_path, "data")
    line = ["-i", data, "-o", tmp_path / "disk", *direct]
    done = program("preprocess.stage", *line)
    assert done.code == 1 and f"error: {bad}: its CRC-32C is not that in manifest.jsonl; " in done.err
    assert len(open_folder(tmp_path / "disk" / "train")) == 5
    bad.write_bytes(whole)
    assert program("preprocess.stage", *line).code == 0


def test_source_that_was_changed_on_purpose_needs_a_new_manifest(tmp_path: Path) -> None:
    data, bad, _ = changed_under_a_manifest(tmp_path, "data")
    line = ["-i", data / "train", "-o", tmp_path / "out", "--to", "tfrecord"]
    done = program("preprocess.convert", *line)
    assert "remove manifest.jsonl and regenerate it with python -m preprocess.verify --write" in done.err
    (data / "train" / "manifest.jsonl").unlink()
    assert program("preprocess.verify", data / "train", "--write").code == 0
    assert program("preprocess.convert", *line).code == 0
    np.testing.assert_array_equal(open_folder(tmp_path / "out").read(1).counts, np.load(bad))
