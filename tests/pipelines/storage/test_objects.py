"""Bad input from an object store: one line that names it, in time, without secrets."""

from __future__ import annotations

import pickle
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, Rule
from helpers import inline_workers, program, write_tiny
from object_store import HOST, Bucket

from pipelines.dataset.open import open_folder
from pipelines.errors import ConfigError, DataError, MissingError, StorageError, UnreadableError, UserError
from pipelines.storage import requests
from pipelines.storage.location import parse_location
from pipelines.storage.requests import COUNTS
from pipelines.storage.select import storage_of

SECRETS = ("sesame", "WRONGKEY")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders packed and npy, each with five samples and a manifest."""
    root = tmp_path_factory.mktemp("sets")
    write_tiny(root / "npy", train=5, validation=1)
    with inline_workers():
        line = ["-i", root / "npy", "-o", root / "packed", "--to", "packed", "--samples-per-shard", 3]
        assert program("preprocess.convert", *line).code == 0
        assert program("preprocess.verify", root / "npy", "--write").code == 0
    return root


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of a network of this machine."""
    for name, seconds in (("_RACE_SECONDS", 0.2), ("_FIRST_PAUSE", 0.02), ("_THROTTLED_PAUSE", 0.04)):
        monkeypatch.setattr(requests, name, seconds)


@pytest.fixture
def url(bucket: Bucket, fault_proxy: FaultProxy, sets: Path) -> str:
    """The address of these folders behind the proxy."""
    return bucket.put(sets)


def read(address: str) -> None:
    """Open the samples at `address`, and read one."""
    open_folder(parse_location(address, "data.dir")).payload(0)


def refusal(address: str, seconds: float = 3.0) -> UserError:
    """The error of `read`, which names its thing in one line, soon, without secrets."""
    started = time.monotonic()
    with pytest.raises(UserError) as found:
        read(address)
    assert time.monotonic() - started < seconds
    text = str(found.value)
    assert "\n" not in text and not any(secret in text for secret in SECRETS)
    return found.value


@pytest.mark.parametrize(
    ("fault", "name", "kind", "text"),
    [
        ("expired token", "", StorageError, "credentials have expired"),
        ("clock skew", "", StorageError, "clock"),
        ("redirect", "", StorageError, "region"),
        ("html", "shard_000000.tar", StorageError, "range requests"),
        ("html", "manifest.jsonl", DataError, "an HTML page"),
        ("html", "universe_0000_000_data.npy", DataError, "manifest.jsonl says"),
        ("gzip", "shard_000000.tar", StorageError, "gzip"),
        ("gzip", "manifest.jsonl", DataError, "gzip"),
        ("gzip", "universe_0000_000_data.npy", DataError, "manifest.jsonl says"),
        ("ignore range", "shard_000000.tar", StorageError, "range requests"),
        ("corrupt", "shard_000000.tar", DataError, "CRC"),
        ("corrupt", "universe_0000_000_data.npy", DataError, "CRC"),
        ("corrupt", "universe_0000_000_label.npy", DataError, "CRC"),
    ],
)
def test_an_answer_that_stays_wrong(
    url: str, fault_proxy: FaultProxy, fault: Fault, name: str, kind: Any, text: str
) -> None:
    folder = f"{url}/{'npy' if name.endswith('npy') else 'packed'}/train"
    fault_proxy.configure(Rule(fault, match=f"GET .*{name}"))
    error = refusal(folder)
    assert isinstance(error, kind) and text in str(error)
    assert error.path.startswith(f"{folder}/{name or 'manifest.jsonl'}")
    # What was damaged on its way was transferred again; what is refused was not.
    faulty = [one for one in fault_proxy.requests() if one.fault and one.path.endswith(name)]
    assert len(faulty) == (3 if kind is DataError else 1)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"AWS_ACCESS_KEY_ID": "WRONGKEY"}, "access key is unknown"),
        ({"AWS_SECRET_ACCESS_KEY": "sesame"}, "secret key"),
        ({"AWS_ENDPOINT_URL": f"{HOST}:80"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "user:sesame@host"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": f"http://user:sesame@{HOST}:80"}, "password"),
        ({"AWS_PROFILE": "nobody"}, "nobody"),
    ],
)
def test_settings_of_the_environment_that_are_wrong(
    url: str, variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert text in str(refusal(f"{url}/packed/train"))


@pytest.mark.slow
def test_a_machine_without_credentials_does_not_wait_for_a_role(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((HOST, 0)) as silent:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
            monkeypatch.delenv(name)
        # As an instance's metadata service that never answers.
        endpoint = f"http://{HOST}:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint)
        assert "access is denied" in str(refusal(f"{url}/packed/train", 8))


def test_what_does_not_exist(url: str, bucket: Bucket) -> None:
    assert "bucket" in str(refusal("s3://no-such-bucket/packed/train"))
    for address in (f"{url}/none", f"{bucket.http}/none"):
        error = refusal(address)
        assert isinstance(error, UnreadableError) and error.path == address
    error = refusal(bucket.url)
    assert isinstance(error, DataError) and error.path == f"{bucket.url}/"
    write = storage_of(parse_location(url, "")).remove
    write(parse_location(f"{url}/packed/train/shard_000000.tar", ""))
    error = refusal(f"{url}/packed/train")
    assert isinstance(error, MissingError) and error.path.endswith("shard_000000.tar")


def test_a_manifest_that_is_cut_off(url: str, bucket: Bucket, sets: Path) -> None:
    content = (sets / "packed" / "train" / "manifest.jsonl").read_bytes()
    for length in (0, 50, content.rindex(b"["), len(content) - 20):
        bucket.write("data/packed/train/manifest.jsonl", content[:length])
        # As another process, which has not read it before.
        from pipelines.storage import objects

        objects._client.cache_clear()
        error = refusal(f"{url}/packed/train")
        assert isinstance(error, DataError) and error.path.endswith("manifest.jsonl")


@pytest.mark.parametrize("length", [0, 100])
def test_an_object_that_changes_is_refused_by_name(url: str, bucket: Bucket, sets: Path, length: int) -> None:
    split = open_folder(parse_location(f"{url}/packed/train", ""))
    split.payload(0)
    shard = bytearray((sets / "packed" / "train" / "shard_000000.tar").read_bytes())
    shard[700] ^= 1
    bucket.write("data/packed/train/shard_000000.tar", bytes(shard) + bytes(length))
    with pytest.raises(DataError) as found:
        split.payload(1)
    assert found.value.path.endswith("shard_000000.tar") and "changed" in found.value.fault


def test_a_file_that_is_not_that_of_the_manifest(url: str, bucket: Bucket, sets: Path) -> None:
    label = bytearray((sets / "npy" / "train" / "universe_0000_000_label.npy").read_bytes())
    label[-1] ^= 1
    for number, content in enumerate((bytes(label), bytes(label[:-1]))):
        bucket.put(sets / "npy", f"data/{number}")
        bucket.write(f"data/{number}/train/universe_0000_000_label.npy", content)
        error = refusal(f"{url}/{number}/train")
        assert isinstance(error, DataError) and error.path.endswith("_label.npy")
        assert "manifest" in error.fault


@pytest.mark.parametrize(
    "address",
    [
        "s3://user:sesame@bucket/folder",
        "https://host/folder?X-Amz-Signature=sesame",
        "https://host/folder#sesame",
        "https://host?X-Amz-Signature=sesame",
        "s3://user:ses?ame@bucket",
        "ftp://user:sesame@host/folder",
        "s3:///folder",
        "file://host/folder",
        "s3://bucket/fol\nder",
    ],
)
def test_a_url_that_is_refused_before_any_request(address: str) -> None:
    error = refusal(address, 0.5)
    assert isinstance(error, ConfigError) and error.key == "data.dir"


def test_a_file_url_is_a_path() -> None:
    assert parse_location("file:///a%20b/c", "") == Path("/a b/c")


def test_without_obstore_one_line_says_what_to_install(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    error = refusal(url.replace("s3://", "s3://other"))
    assert isinstance(error, ConfigError) and "pip install" in str(error)


def test_a_server_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "FIRST_DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(requests, "REQUEST_SECONDS", 0.3)
    with socket.create_server((HOST, 0)) as silent, socket.create_server((HOST, 0)) as closed:
        ports = [one.getsockname()[1] for one in (silent, closed)]
        closed.close()
        for host, text in (
            (f"{HOST}:{ports[0]}", "no answer in time"),
            (f"{HOST}:{ports[1]}", "refused"),
            ("no-such-host.invalid", "not found"),
        ):
            error = refusal(f"http://{host}/folder")
            assert isinstance(error, StorageError) and text in str(error)


def test_a_server_that_stops_is_waited_for_and_then_named(
    url: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 0.4)
    split = open_folder(parse_location(f"{url}/packed/train", ""))
    split.payload(0)
    fault_proxy.refuse()
    started = time.monotonic()
    with pytest.raises(StorageError) as found:
        split.payload(1)
    assert time.monotonic() - started < 3 and found.value.path.endswith(".tar")
    fault_proxy.accept()
    split.payload(1)


def test_requests_that_fail_are_repeated_and_counted(url: str, fault_proxy: FaultProxy) -> None:
    before = COUNTS.retries, COUNTS.throttled
    fault_proxy.configure(
        Rule("slow down", match="tar", times=1),
        Rule("reset", match="tar", times=1),
        Rule("truncate", match="tar", times=1),
        Rule("corrupt", match="tar", times=1),
    )
    read(f"{url}/packed/train")
    assert (COUNTS.retries - before[0], COUNTS.throttled - before[1]) == (4, 1)
    assert len(fault_proxy.requests()) == 6


def test_a_stalled_request_is_raced(url: str, fault_proxy: FaultProxy) -> None:
    before = COUNTS.raced
    fault_proxy.configure(Rule("stall", match="tar", times=1))
    read(f"{url}/packed/train")
    assert COUNTS.raced == before + 1


def test_storage_is_picklable_and_a_data_set_with_it(url: str) -> None:
    split = open_folder(parse_location(f"{url}/packed/train", ""))
    copy = pickle.loads(pickle.dumps(split))
    assert copy.storage == split.storage and copy.read(0).target.tolist() == split.read(0).target.tolist()
