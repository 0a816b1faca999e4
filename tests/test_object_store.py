"""The object store and the proxy of the tests do what they say to plain clients."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import socket
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from fault_proxy import Fault, FaultProxy, Rule
from object_store import HOST, Bucket

CONTENT = bytes(range(256)) * 1024
RANGE = {"Range": "bytes=1000-65999"}
PART = CONTENT[1000:66000]


@pytest.fixture
def url(bucket: Bucket, fault_proxy: FaultProxy) -> str:
    """A signed address of an object behind the proxy, for clients that sign nothing."""
    bucket.write("a.bin", CONTENT)
    parameters = {"Bucket": bucket.name, "Key": "a.bin"}
    return str(boto3.client("s3").generate_presigned_url("get_object", parameters))


def get(url: str) -> tuple[int, bytes, dict[str, str]]:
    """Return status, body and headers of an answer."""
    parts = urllib.parse.urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=0.3)) as connection:
        return get_on(connection, url)


def get_on(connection: http.client.HTTPConnection, url: str) -> tuple[int, bytes, dict[str, str]]:
    """Return the same on a connection that stays open."""
    parts = urllib.parse.urlsplit(url)
    connection.request("GET", f"{parts.path}?{parts.query}", headers=RANGE)
    answer = connection.getresponse()
    return answer.status, answer.read(), dict(answer.getheaders())


def test_a_folder_is_put_and_read_with_a_signature(
    bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ä +.bin").write_bytes(CONTENT)
    assert bucket.put(tmp_path) == f"s3://{bucket.name}/data"
    client = boto3.client("s3")
    assert client.get_object(Bucket=bucket.name, Key="data/in/ä +.bin")["Body"].read() == CONTENT
    client.put_object(Bucket=bucket.name, Key="new", Body=CONTENT)
    assert [one["Key"] for one in client.list_objects_v2(Bucket=bucket.name)["Contents"]] == [
        "data/in/ä +.bin",
        "new",
    ]
    done = fault_proxy.requests()
    assert [(one.method, one.status, one.fault) for one in done] == [
        ("GET", 200, ""),
        ("PUT", 200, ""),
        ("GET", 200, ""),
    ]
    assert done[0].sent == len(CONTENT) and done[1].received >= len(CONTENT)
    with pytest.raises(ClientError, match="InvalidAccessKeyId"):
        boto3.client("s3", aws_access_key_id="wrong", aws_secret_access_key="wrong").list_objects_v2(
            Bucket=bucket.name
        )


def test_a_server_that_was_killed_has_its_objects_when_it_is_back(bucket: Bucket) -> None:
    bucket.write("a.bin", CONTENT)
    bucket.store.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, bucket.store.port))
    bucket.store.start()
    answer = boto3.client("s3").get_object(Bucket=bucket.name, Key="a.bin", Range=RANGE["Range"])
    assert answer["Body"].read() == PART


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ("html", 200, b"<html>"),
        ("slow down", 503, b"<Code>SlowDown</Code>"),
        ("expired token", 400, b"<Code>ExpiredToken</Code>"),
        ("clock skew", 403, b"<Code>RequestTimeTooSkewed</Code>"),
        ("redirect", 301, b"<Code>PermanentRedirect</Code>"),
    ],
)
def test_an_answer_that_the_server_did_not_give(
    url: str, fault_proxy: FaultProxy, fault: Fault, status: int, text: bytes
) -> None:
    fault_proxy.configure(Rule(fault, times=1))
    with contextlib.closing(http.client.HTTPConnection(HOST, fault_proxy.port)) as connection:
        found, body, _ = get_on(connection, url)
        assert found == status and text in body
        assert get_on(connection, url)[:2] == (206, PART)
    assert [(one.fault, one.status, one.sent) for one in fault_proxy.requests()] == [
        (fault, status, len(body)),
        ("", 206, len(PART)),
    ]


@pytest.mark.parametrize("after", [None, 1000])
def test_a_connection_that_breaks_or_stalls(url: str, fault_proxy: FaultProxy, after: int | None) -> None:
    fault_proxy.configure(
        Rule("reset", times=1, after=after),
        Rule("truncate", times=1, after=after),
        Rule("stall", times=1, after=after),
    )
    with pytest.raises(ConnectionResetError):
        get(url)
    with pytest.raises(http.client.IncompleteRead) as error:
        get(url)
    assert error.value.partial == PART[: after or len(PART) // 2]
    with pytest.raises(TimeoutError):
        get(url)
    assert get(url)[:2] == (206, PART)
    assert [one.fault for one in fault_proxy.requests()] == ["reset", "truncate", "stall", ""]


def test_a_body_that_is_not_what_was_asked_for(url: str, fault_proxy: FaultProxy) -> None:
    fault_proxy.configure(
        Rule("corrupt", after=10, times=1), Rule("gzip", times=1), Rule("ignore range", times=1)
    )
    status, body, _ = get(url)
    assert status == 206 and body == PART[:10] + bytes([PART[10] ^ 1]) + PART[11:]
    status, body, headers = get(url)
    assert headers["Content-Encoding"] == "gzip" and gzip.decompress(body) == PART
    assert get(url)[:2] == (200, CONTENT)
    assert [one.sent for one in fault_proxy.requests()] == [len(PART), len(body), len(CONTENT)]


def test_latency_is_added_to_each_answer_and_delays_to_some(url: str, fault_proxy: FaultProxy) -> None:
    fault_proxy.configure(Rule("delay", skip=1, times=1, seconds=0.1), latency=0.05)
    for least in (0.05, 0.15, 0.05):
        started = time.monotonic()
        assert get(url)[:2] == (206, PART)
        assert time.monotonic() - started >= least


def test_a_fraction_is_drawn_by_seed_and_request(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    def faulty(seed: int, keys: list[str]) -> dict[str, str]:
        fault_proxy.reset()
        rules = [
            Rule(fault, match=r"^GET .*/key", fraction=0.2, seed=seed) for fault in ("slow down", "html")
        ]
        fault_proxy.configure(*rules)
        with contextlib.closing(http.client.HTTPConnection(HOST, fault_proxy.port)) as connection:
            for key in keys:
                get_on(connection, f"http://{HOST}/{bucket.name}/{key}")
        return {one.path: one.fault for one in fault_proxy.requests() if one.fault}

    keys = [f"key{number}" for number in range(200)]
    chosen = faulty(1, keys)
    # 40 and 32, by five standard deviations.
    counts = Counter(chosen.values())
    assert 11 < counts["slow down"] < 69 and 6 < counts["html"] < 58
    assert faulty(1, keys[::-1]) == chosen != faulty(2, keys)


def test_connections_are_refused_until_they_are_accepted(url: str, fault_proxy: FaultProxy) -> None:
    fault_proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        get(url)
    fault_proxy.accept()
    assert get(url)[:2] == (206, PART)
