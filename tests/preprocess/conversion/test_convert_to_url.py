"""Conversion into an object store: equal to a local one, resumed after a kill, errors in one line."""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import crc32c
import numpy as np
import pytest
from fault_proxy import FaultProxy, Request, Rule
from helpers import command, inline_workers, kill, program, start, started_by, tiny_sample, write_tiny
from object_store import Bucket

from pipelines.dataset.manifest import MANIFEST, SourceFingerprint
from pipelines.distributed.locks import locked
from pipelines.errors import AccessError, DataError
from pipelines.formats.npy import write_npy
from pipelines.io import WrittenFile
from pipelines.sample import Sample, SampleSpec, SplitName
from pipelines.storage.location import Url
from pipelines.storage.objects import ObjectStorage
from pipelines.storage.uploads import InterruptedUploadError
from preprocess.conversion.progress import lock_target
from preprocess.conversion.target import check_not_replaced, reopen
from preprocess.conversion.task_result import Announce, WorkItem, convert_if_stale
from preprocess.simulator.universe import SimulateConfig

CONVERT, VERIFY, SIMULATE = "preprocess.convert", "preprocess.verify", "preprocess.simulate"
inline = pytest.mark.usefixtures("inline_workers")


def local_content(folder: Path) -> dict[str, bytes]:
    """The files below `folder`, except locks, by their paths in it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def stored_content(bucket: Bucket, prefix: str) -> dict[str, bytes]:
    """The objects below `prefix`, by the rest of their keys."""
    client = boto3.client("s3")
    found = client.list_objects_v2(Bucket=bucket.name, Prefix=f"{prefix}/").get("Contents", [])
    return {
        one["Key"].removeprefix(f"{prefix}/"): client.get_object(Bucket=bucket.name, Key=one["Key"])[
            "Body"
        ].read()
        for one in found
    }


def uploads(requests: list[Request], pattern: str = "") -> Counter[str]:
    """Number of whole uploads of each object whose name has `pattern`."""
    done = (one for one in requests if one.status == 200)
    names = (
        one.path
        for one in done
        if (one.method == "PUT" and "partNumber" not in one.query)
        or (one.method == "POST" and "uploadId" in one.query)
    )
    return Counter("/".join(name.split("/")[3:]) for name in names if re.search(pattern, name))


@inline
def test_a_conversion_equals_a_local_one_and_is_not_repeated(
    tiny: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    rest = ["--to", "packed", "--samples-per-shard", 4]
    assert program(CONVERT, "-i", tiny, "-o", tmp_path / "local", *rest).code == 0
    # 26 training and 7 validation samples: 7 and 2 shards.
    for shards in (9, 0):
        done = program(CONVERT, "-i", tiny, "-o", f"{bucket.url}/out", *rest)
        assert (done.code, done.err) == (0, "")
        assert sum(uploads(fault_proxy.requests(), r"\.tar$").values()) == shards
        fault_proxy.reset()
    assert stored_content(bucket, "out") == local_content(tmp_path / "local")
    done = program(VERIFY, f"{bucket.url}/out", "--workers", 1)
    assert (done.code, done.err) == (0, "")


@inline
def test_what_changed_is_converted_again(bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "data", train=6, validation=1) / "train"
    arguments = ["-i", source, "-o", f"{bucket.url}/out", "--to", "npy"]
    assert program(CONVERT, *arguments).code == 0
    fault_proxy.reset()
    path = source / "universe_0003_000_data.npy"
    write_npy(path, np.load(path) + np.int16(1))
    (source / "universe_0001_000_label.npy").write_bytes(b"damaged")
    done = program(CONVERT, *arguments)
    assert done.code == 1 and "universe_0001_000" in done.err
    again = uploads(fault_proxy.requests(), r"\.npy$")
    assert again == {f"universe_0003_000_{part}.npy": 1 for part in ("data", "label")}
    # The sample of the earlier state of the source stays, and there is no manifest.
    names = stored_content(bucket, "out")
    assert "universe_0001_000_data.npy" in names and MANIFEST not in names
    write_tiny(tmp_path / "new", train=2, validation=1)
    whole = (tmp_path / "new" / "train" / "universe_0001_000_label.npy").read_bytes()
    (source / "universe_0001_000_label.npy").write_bytes(whole)
    fault_proxy.reset()
    assert program(CONVERT, *arguments).code == 0
    again = uploads(fault_proxy.requests(), r"\.npy$")
    assert again == {f"universe_0001_000_{part}.npy": 1 for part in ("data", "label")}
    assert program(CONVERT, "-i", source, "-o", tmp_path / "local", "--to", "npy").code == 0
    assert stored_content(bucket, "out") == local_content(tmp_path / "local")


@inline
@pytest.mark.parametrize(
    ("fault", "words"),
    [("expired token", "expired"), ("redirect", "AWS_REGION")],
)
def test_a_refusal_is_one_line(
    fault: str, words: str, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "data", train=2, validation=1) / "train"
    fault_proxy.configure(Rule(fault, r"PUT .*000_", skip=2))  # type: ignore[arg-type]
    arguments = ["-i", source, "-o", f"{bucket.url}/out", "--to", "npy"]
    done = program(CONVERT, *arguments)
    (line,) = done.err.splitlines()
    assert done.code == 1 and words in line and f"{bucket.url}/out/universe_000" in line
    fault_proxy.configure()
    done = program(CONVERT, *arguments)
    assert done.code == 0 and "1 samples converted, 1 up to date" in done.out


@inline
def test_uploads_are_repeated(bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "data", train=3, validation=1) / "train"
    fault_proxy.configure(
        Rule("slow down", "PUT .*_data.npy", times=1),
        Rule("reset", "PUT .*_label.npy", skip=1, times=1),
        Rule("truncate", "POST .*delete", times=1),
        Rule("reset", "POST .*delete", times=1),
    )
    assert program(CONVERT, "-i", source, "-o", f"{bucket.url}/out", "--to", "npy").code == 0
    assert program(CONVERT, "-i", source, "-o", tmp_path / "local", "--to", "npy").code == 0
    assert stored_content(bucket, "out") == local_content(tmp_path / "local")


def test_an_upload_in_parts(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    url, storage = Url("s3", bucket.name, "out"), ObjectStorage("s3", bucket.name)
    pieces = [bytes([number]) * (1 << 20) for number in range(11)]
    fault_proxy.configure(Rule("reset", "PUT .*partNumber=2", times=1))
    written = storage.write_stream(url, iter(pieces))
    content = storage.read(url)
    assert content == b"".join(pieces) and written == (url, len(content), crc32c.crc32c(content), ())
    for rule, kind in (
        (Rule("truncate", "POST .*uploads", times=1), InterruptedUploadError),
        (Rule("expired token", "PUT .*partNumber=2", times=1), AccessError),
    ):
        fault_proxy.configure(rule)
        with pytest.raises(AccessError) as error:
            storage.write_stream(url / "other", iter(pieces))
        assert type(error.value) is kind and error.value.path == f"{url}/other"
        assert not storage.is_present(url / "other")
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])
    assert len(uploads) == 1, "only that whose identity did not arrive"


def test_an_upload_that_breaks_off_is_made_again(tmp_path: Path) -> None:
    attempts: list[int] = []

    def convert(_: Announce) -> Iterator[tuple[str, list[WrittenFile]]]:
        attempts.append(len(attempts))
        if len(attempts) < 3:
            raise InterruptedUploadError("s3://bucket/out", "cannot be written", "try again")
        yield "a", [WrittenFile(tmp_path / "a.tar", 7, 0)]

    result = convert_if_stale(WorkItem(None, ["a"]), tmp_path, lambda: SourceFingerprint(1, "0"), convert)
    assert [entry.name for entry in result.written] == ["a"] and len(attempts) == 3


def test_a_conversion_that_began_elsewhere_is_noticed(bucket: Bucket) -> None:
    folder = Url("s3", bucket.name, "out")
    journal = reopen(folder, "npy", SampleSpec(16), [], samples=[])
    check_not_replaced(journal)
    bucket.write("out/.journal.npy.0.jsonl", b"of another run")
    with pytest.raises(DataError) as error:
        check_not_replaced(journal)
    assert error.value.path == str(folder)


@inline
def test_missing_objects_are_made_again(
    tiny: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    rest = ["--to", "packed", "--samples-per-shard", 4]
    arguments = ["-i", tiny / "train", "-o", f"{bucket.url}/out", *rest]
    # The record of the third shard is there before the shard; then one of each kind is lost.
    fault_proxy.configure(Rule("expired token", r"PUT .*2\.tar"))
    assert program(CONVERT, *arguments).code == 1
    for name in ("shard_000000.tar", "shard_000001.idx"):
        boto3.client("s3").delete_object(Bucket=bucket.name, Key=f"out/{name}")
    fault_proxy.reset()
    done = program(CONVERT, *arguments)
    assert done.code == 0 and "26 samples converted, 0 up to date" in done.out
    assert program(CONVERT, "-i", tiny / "train", "-o", tmp_path / "local", *rest).code == 0
    assert stored_content(bucket, "out") == local_content(tmp_path / "local")


def test_one_run_at_a_time_on_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def wait(_: str) -> None:
        raise TimeoutError

    with lock_target(Url("s3", "bucket", "out")), lock_target(Url("s3", "bucket", "other")):
        places = list(tmp_path.glob("*/*"))
        assert len(places) == 2
        for place in places:
            with pytest.raises(TimeoutError), locked(place, wait):
                pass


@inline
def test_foreign_objects_are_refused(tiny: Path, bucket: Bucket) -> None:
    bucket.write("out/train/universe_0001_000_data.npy", b"of someone else")
    done = program(CONVERT, "-i", tiny, "-o", f"{bucket.url}/out", "--to", "npy")
    (line,) = done.err.splitlines()
    assert done.code == 1 and f"{bucket.url}/out/train: holds universe_0001_000_data.npy" in line
    assert list(stored_content(bucket, "out")) == ["train/universe_0001_000_data.npy"]


@inline
def test_a_simulated_set_grows_and_gets_a_manifest(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulated(config: SimulateConfig, split: SplitName, universe: int) -> Iterator[tuple[str, Sample]]:
        yield (
            config.sample_ids(split, universe)[0],
            tiny_sample(universe + (1000 if split == "validation" else 0)),
        )

    monkeypatch.setattr("preprocess.simulator.universe.simulate_universe", simulated)
    rest = ["--size", 32, "--workers", 1, "--format", "npy", "--validation", 1]
    url = f"{bucket.url}/out"
    with inline_workers("preprocess.simulate"):
        assert program(SIMULATE, "-o", url, "--train", 1, *rest).code == 0
        boto3.client("s3").delete_object(Bucket=bucket.name, Key="out/train/univ_a0000000_000_data.npy")
        done = program(SIMULATE, "-o", url, "--train", 2, *rest)
        assert done.code == 0 and "simulated 2 universes" in done.out
        assert program(SIMULATE, "-o", tmp_path / "local", "--train", 2, *rest).code == 0
    for place in (url, tmp_path / "local"):
        assert program(VERIFY, place, "--write", "--workers", 1).code == 0
    assert stored_content(bucket, "out") == local_content(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_any_moment(tiny: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path) -> None:
    chance, midway = random.Random(5), 0
    rest = ["--to", "packed", "--samples-per-shard", 2, "--workers", 2]
    assert program(CONVERT, "-i", tiny, "-o", tmp_path / "local", *rest).code == 0
    for number in range(3):
        fault_proxy.reset()
        fault_proxy.configure(latency=0.02)
        arguments = ["-i", tiny, "-o", f"{bucket.url}/out-{number}", *rest]
        running, shards = start(command(CONVERT, arguments)), chance.randrange(1, 12)
        while sum(uploads(fault_proxy.requests(), r"\.tar$").values()) < shards and running.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1))
        kill([running.pid, *started_by(running.pid)])
        running.wait(timeout=30)
        before = fault_proxy.requests()
        fault_proxy.reset()
        assert program(CONVERT, *arguments).code == 0
        after = fault_proxy.requests()
        complete = uploads(before, r"\.tar$")
        midway += bool(complete)
        assert not complete & uploads(after, r"\.tar$")
        assert stored_content(bucket, f"out-{number}") == local_content(tmp_path / "local")
    assert midway
