"""Download of a part of a data set in an object store: which samples, their bytes, damage, resumption."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import FaultProxy, Rule
from helpers import program, write_tiny
from object_store import Bucket

from pipelines.dataset.manifest import MANIFEST, Manifest
from pipelines.dataset.open import open_folder
from pipelines.storage.objects import _client

DOWNLOAD, CONVERT, VERIFY = "preprocess.download", "preprocess.convert", "preprocess.verify"

pytestmark = pytest.mark.usefixtures("inline_workers")


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set in shards of 4 samples, 7 and 2 of them."""
    folder = tmp_path_factory.mktemp("packed")
    assert program(CONVERT, "-i", tiny, "-o", folder, "--to", "packed", "--samples-per-shard", 4).code == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of the samples in `folder`, by name."""
    skipped = re.compile(r"\.lock|manifest\.jsonl|.*\.lst")
    return {path.name: path.read_bytes() for path in folder.iterdir() if not skipped.fullmatch(path.name)}


def check_equal(source: Path, target: Path, part: slice) -> None:
    """Check that `target` holds the samples `part` of `source`, and that its manifest is right."""
    there, here = open_folder(source), open_folder(target)
    wanted = range(len(there))[part]
    assert [here.sample_id(i) for i in range(len(here))] == [there.sample_id(i) for i in wanted]
    for mine, other in enumerate(wanted):
        np.testing.assert_array_equal(here.read(mine, verify=True).counts, there.read(other).counts)
    assert Manifest.load(target) is not None
    done = program(VERIFY, target, "--workers", 1)
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--samples", "6:15", slice(6, 15)),
        ("--samples", "20:", slice(20, None)),
        ("--shards", "1:3", slice(4, 12)),
    ],
)
def test_part_of_packed_samples(
    option: str, value: str, part: slice, packed: Path, bucket: Bucket, tmp_path: Path
) -> None:
    url = bucket.put(packed)
    done = program(DOWNLOAD, "--from", url, "--split", "train", option, value, "-o", tmp_path)
    assert (done.code, done.err) == (0, "")
    check_equal(packed / "train", tmp_path / "train", part)
    assert not (tmp_path / "validation").exists()


def test_all_of_it_is_the_same_files_and_is_fetched_once(
    packed: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    url = bucket.put(packed)
    for fetched in (9, 0):
        fault_proxy.reset()
        assert program(DOWNLOAD, "--from", url, "-o", tmp_path).code == 0
        requests = fault_proxy.requests()
        assert sum(one.method == "GET" and one.path.endswith(".tar") for one in requests) == fetched
    for split in ("train", "validation"):
        assert contents(tmp_path / split) == contents(packed / split)


@pytest.mark.parametrize(
    ("format_name", "manifest"),
    [("npy", True), ("npy", False), ("tfrecord", True), ("tfrecord_gzip", False)],
)
def test_part_of_files(format_name: str, manifest: bool, bucket: Bucket, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "data", train=5, validation=1, format_name=format_name) / "train"
    if manifest:
        assert program(VERIFY, source, "--write", "--workers", 1).code == 0
    arguments = ["--from", bucket.put(source), "-o", tmp_path / "out"]
    for count in (2, 4):
        done = program(DOWNLOAD, *arguments, "--samples", count)
        assert done.code == 0 and "2 samples copied" in done.out
        check_equal(source, tmp_path / "out", slice(count))
    wanted = {name: content for name, content in contents(source).items() if "_0004_" not in name}
    assert contents(tmp_path / "out") == wanted


def test_a_web_server_with_a_manifest(packed: Path, bucket: Bucket, tmp_path: Path) -> None:
    bucket.put(packed)
    done = program(DOWNLOAD, "--from", f"{bucket.http}/data", "--samples", "6", "-o", tmp_path)
    assert (done.code, done.err) == (0, "")
    check_equal(packed / "train", tmp_path / "train", slice(6))


@pytest.mark.parametrize("samples", ["0:12", "1:11"])
def test_damage_on_the_way_is_repaired(
    samples: str, packed: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    url = bucket.put(packed)
    fault_proxy.configure(
        Rule("corrupt", r"GET .*1\.tar", times=1),
        Rule("truncate", r"GET .*2\.tar", times=1),
        Rule("slow down", r"GET .*0\.tar", times=1),
    )
    done = program(DOWNLOAD, "--from", url, "--split", "train", "--samples", samples, "-o", tmp_path)
    assert (done.code, done.err) == (0, "")
    check_equal(packed / "train", tmp_path / "train", slice(*map(int, samples.split(":"))))


def test_verify_tells_damage_on_the_way_from_damage_in_the_store(
    packed: Path, bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    url = bucket.put(packed)
    fault_proxy.configure(Rule("corrupt", r"GET .*1\.tar", times=1))
    assert program(VERIFY, url).code == 0
    fault_proxy.configure(Rule("corrupt", r"GET .*1\.tar"))
    done = program(VERIFY, url)
    assert done.code == 1 and "shard_000001.tar" in done.err


def test_damage_in_the_store_is_named_and_the_rest_fetched(
    packed: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    url = bucket.put(packed)
    whole = (packed / "train" / "shard_000002.tar").read_bytes()
    bucket.write("data/train/shard_000002.tar", whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    arguments = ["--from", url, "--split", "train", "-o", tmp_path]
    done = program(DOWNLOAD, *arguments)
    assert done.code == 1 and f"{url}/train/shard_000002.tar" in done.err
    assert not (tmp_path / "train" / MANIFEST).exists()
    assert not (tmp_path / "train" / "shard_000002.tar").exists()
    bucket.write("data/train/shard_000002.tar", whole)
    # Another run does not know the state of the damaged object.
    _client.cache_clear()
    fault_proxy.reset()
    assert program(DOWNLOAD, *arguments).code == 0
    fetched = [one.path for one in fault_proxy.requests() if one.method == "GET" and ".tar" in one.path]
    assert len(fetched) == 1 and contents(tmp_path / "train") == contents(packed / "train")


def test_what_is_not_there_is_one_line(packed: Path, bucket: Bucket, tiny: Path, tmp_path: Path) -> None:
    packed_url, files_url = bucket.put(packed), bucket.put(tiny, "files")
    for arguments in (
        ["--from", packed_url, "--samples", "100:"],
        ["--from", packed_url, "--shards", "7:9", "--split", "train"],
        ["--from", files_url, "--shards", "1"],
        ["--from", packed_url, "--split", "test"],
        ["--from", f"{bucket.url}/nothing"],
        ["--from", packed_url, "--samples", "many"],
        ["--from", packed_url, "--samples", "1", "--shards", "1"],
        ["--from", packed_url, "--sha256", "0"],
        ["--small", "--samples", "1"],
        [],
    ):
        done = program(DOWNLOAD, *arguments, "-o", tmp_path / "out")
        (line,) = done.err.splitlines()
        assert done.code == 1 and line.startswith("error: ")
        assert not (tmp_path / "out").exists()
