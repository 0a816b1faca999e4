"""Addresses that users write, and those of files in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines.errors import ConfigError, DataError
from pipelines.storage.location import Url, parse_location


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data", Path("data")),
        ("/a/b", Path("/a/b")),
        ("file:///a/b%20c", Path("/a/b c")),
        ("s3://bucket", Url("s3", "bucket")),
        ("s3://bucket/", Url("s3", "bucket")),
        ("S3://bucket/a//b/", Url("s3", "bucket", "a/b")),
        ("https://host:8080/a/./b", Url("https", "host:8080", "a/b")),
        ("az://container/a b", Url("az", "container", "a b")),
    ],
)
def test_addresses(text: str, expected: Path | Url) -> None:
    assert parse_location(text, "data.dir") == expected


@pytest.mark.parametrize(
    "text",
    [
        "ftp://host/a",
        "s3://",
        "s3:///a",
        "file://host/a",
        "https://user:secret@host/a",
        "https://host/a?signature=secret",
        "https://host/a#secret",
        "s3://key:secret@bucket/a",
        "s3://bucket/a\nb",
    ],
)
def test_refused_addresses_show_no_secret(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_location(text, "data.dir")
    assert raised.value.key == "data.dir"
    assert "secret" not in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_names_within_a_url() -> None:
    shard = Url("s3", "bucket", "a") / "train" / "shard.tar"
    assert str(shard) == os.fspath(shard) == "s3://bucket/a/train/shard.tar"
    assert shard.name == "shard.tar"
    assert shard.parent == Url("s3", "bucket", "a/train")
    assert shard.with_name("shard.idx") == Url("s3", "bucket", "a/train/shard.idx")
    assert Url("s3", "bucket") / "." == Url("s3", "bucket")
    assert DataError(shard, "is damaged", "fix it").path == str(shard)
