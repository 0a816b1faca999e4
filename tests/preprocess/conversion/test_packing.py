"""Conversion to and from shards, and staging of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import program, tiny_sample, write_tiny

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.open import open_folder
from pipelines.distributed.locks import LOCK_FILE
from pipelines.formats.registry import FORMATS
from preprocess.convert import plan_conversion

CONVERT = "preprocess.convert"

pytestmark = pytest.mark.usefixtures("inline_workers")


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder` except manifests, whose fingerprints contain times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("format_name", ["tfrecord_gzip", pytest.param("npy", marks=pytest.mark.slow)])
def test_there_and_back(format_name: str, ranks: int, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=11, validation=2, format_name=format_name)
    to_packed = ["-i", data, "-o", tmp_path / "packed", "--to", "packed", "--samples-per-shard", 4]
    done = program(CONVERT, *to_packed, ranks=ranks)
    assert done.code == 0, done.err
    assert "13 samples converted" in done.out and "0 up to date" in done.out
    shards = [f"shard_{number:06d}" for number in range(3)]
    train = tmp_path / "packed" / "train"
    expected = {f"{shard}{end}" for shard in shards for end in (".tar", ".idx")}
    assert {path.name for path in train.iterdir()} == expected | {
        "manifest.jsonl",
        "files_data.lst",
        LOCK_FILE,
    }
    assert (train / "files_data.lst").read_text().split() == [f"{shard}.tar" for shard in shards]
    assert program("preprocess.verify", tmp_path / "packed").code == 0
    back = program(
        CONVERT, "-i", tmp_path / "packed", "-o", tmp_path / "back", "--to", format_name, ranks=ranks
    )
    assert back.code == 0, back.err
    for name, found in content(data).items():
        assert (tmp_path / "back" / name).read_bytes() == found
    again = program(CONVERT, *to_packed)
    assert "0 samples converted" in again.out and "13 up to date" in again.out


@pytest.mark.parametrize(("voxels", "shards"), [(64 * 128**3, 1), (3 * 16**3, 3), (1, 8)])
def test_shards_of_large_samples_hold_fewer(
    voxels: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.convert._SHARD_VOXELS", voxels)
    data = write_tiny(tmp_path / "data", train=8, validation=1)
    plan = plan_conversion(data / "train", tmp_path / "packed", "packed")
    assert len(plan.items) == shards and len(plan.samples) == 8
    assert plan.memory > 2 * plan.spec.bytes


def test_changed_sample_converts_its_shard_again(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=9, validation=1)
    line = ["-i", data / "train", "-o", tmp_path / "packed", "--to", "packed", "--samples-per-shard", 4]
    assert program(CONVERT, *line).code == 0
    before = content(tmp_path / "packed")
    FORMATS["npy"].write(data / "train", "universe_0005_000", tiny_sample(77))
    done = program(CONVERT, *line)
    assert "4 samples converted" in done.out and "5 up to date" in done.out
    changed = {name for name, found in content(tmp_path / "packed").items() if before.get(name) != found}
    assert changed == {"shard_000001.tar", "shard_000001.idx"}
    np.testing.assert_array_equal(open_folder(tmp_path / "packed").read(5).counts, tiny_sample(77).counts)


def test_damaged_samples_are_named_and_other_shards_converted(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=9, validation=1, format_name="tfrecord_gzip")
    line = ["-i", data / "train", "-o", tmp_path / "packed", "--to", "packed", "--samples-per-shard", 3]
    bad = [data / "train" / f"universe_000{number}_000.tfrecord" for number in (3, 5)]
    whole = [path.read_bytes() for path in bad]
    for path in bad:
        path.write_bytes(path.read_bytes()[:-9])
    done = program(CONVERT, *line)
    assert done.code == 1
    assert all(f"error: {path}: its gzip stream is cut off" in done.err for path in bad)
    assert sorted(path.name for path in (tmp_path / "packed").glob("*.tar")) == [
        "shard_000000.tar",
        "shard_000002.tar",
    ]
    assert Manifest.load(tmp_path / "packed") is None
    for path, sound in zip(bad, whole, strict=True):
        path.write_bytes(sound)
    done = program(CONVERT, *line)
    assert done.code == 0 and "3 samples converted" in done.out and "6 up to date" in done.out


def test_verify_names_a_damaged_sample_in_its_shard(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=6, validation=1)
    line = ["-i", data / "train", "-o", tmp_path / "packed", "--to", "packed", "--samples-per-shard", 3]
    assert program(CONVERT, *line).code == 0
    split = open_folder(tmp_path / "packed")
    assert split.sharded
    shard = Path(split.files(4)[0])
    broken = bytearray(shard.read_bytes())
    broken[sum(split.member_extents[4].item()[:2]) - 20] ^= 1
    shard.write_bytes(broken)
    done = program("preprocess.verify", tmp_path / "packed")
    assert done.code == 1 and f"checksums: {shard}: its CRC-32C is not the manifest's" in done.err
    (tmp_path / "packed" / "manifest.jsonl").unlink()
    done = program("preprocess.verify", tmp_path / "packed")
    assert done.code == 1 and f"content: {split.path(4)}: the CRC of chunk" in done.err


def test_shard_size_of_zero_is_refused(tiny: Path, tmp_path: Path) -> None:
    done = program(CONVERT, "-i", tiny, "-o", tmp_path, "--to", "packed", "--samples-per-shard", 0)
    assert done.code == 1 and "--samples-per-shard = 0: expected at least one" in done.err


def test_packed_samples_are_staged_unchanged(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=7, validation=2)
    line = ["-i", data, "-o", tmp_path / "packed", "--to", "packed", "--samples-per-shard", 3]
    assert program(CONVERT, *line).code == 0
    done = program("preprocess.stage", "-i", tmp_path / "packed", "-o", tmp_path / "disk")
    assert done.code == 0, done.err
    source, staged = (open_folder(tmp_path / name / "train") for name in ("packed", "disk"))
    assert source.sharded
    assert f"{int(source.member_extents['bytes'].sum()):,} bytes read" in done.out
    assert [staged.sample_id(index) for index in range(7)] == [source.sample_id(index) for index in range(7)]
    for index in range(7):
        assert staged.read_contents(index) == source.read_contents(index)
    assert (
        "staged 0 of 7" in program("preprocess.stage", "-i", tmp_path / "packed", "-o", tmp_path / "disk").out
    )
    # A shard that changed is staged again, and no other.
    os.utime(tmp_path / "packed" / "train" / "shard_000001.tar", ns=(0, 1))
    done = program("preprocess.stage", "-i", tmp_path / "packed", "-o", tmp_path / "disk")
    assert "staged 3 of 7" in done.out
