"""Uploads, to obstore's store in memory: content, checksums, and what an exception leaves."""

from __future__ import annotations

from collections.abc import Iterator

import crc32c
import pytest

from pipelines.errors import AccessError
from pipelines.storage.location import Url
from pipelines.storage.select import storage_of
from pipelines.storage.uploads import PART_BYTES, delete, upload, upload_stream

store_module = pytest.importorskip("obstore.store")

URL = Url("s3", "bucket", "folder/name")


def read(store: object) -> bytes:
    import obstore

    return bytes(obstore.get(store, URL.key).bytes())  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 1, PART_BYTES, 2 * PART_BYTES + 3])
def test_a_stream_becomes_one_object_with_its_checksum(length: int) -> None:
    store, content = store_module.MemoryStore(), bytes(range(256)) * (length // 256 + 1)
    content = content[:length]
    pieces = [content[start : start + 1_000_003] for start in range(0, length, 1_000_003)]
    assert upload_stream(store, URL, iter(pieces)) == (URL, length, crc32c.crc32c(content), ())
    assert read(store) == content


def test_chunks_become_one_object_with_their_checksum() -> None:
    store = store_module.MemoryStore()
    assert upload(store, URL, [b"abc", memoryview(b"def")]) == (URL, 6, crc32c.crc32c(b"abcdef"), ())
    assert read(store) == b"abcdef"


@pytest.mark.parametrize("after", [100, 3 * PART_BYTES])
def test_an_exception_from_the_pieces_leaves_no_object(after: int) -> None:
    store, error = store_module.MemoryStore(), AccessError("source", "cannot be read", "look")

    def pieces() -> Iterator[bytes]:
        for _ in range(after // 100):
            yield bytes(100)
        raise error

    with pytest.raises(AccessError) as found:
        upload_stream(store, URL, pieces())
    assert found.value is error
    with pytest.raises(FileNotFoundError):
        read(store)


@pytest.mark.parametrize("length", [100, 3 * PART_BYTES])
def test_pieces_may_upload_something_else(length: int) -> None:
    store, other = store_module.MemoryStore(), Url("s3", "bucket", "folder/other")

    def pieces() -> Iterator[bytes]:
        for _ in range(length // 100):
            yield bytes(100)
        upload(store, other, [b"abc"])
        delete(store, other)

    upload_stream(store, URL, pieces())
    assert read(store) == bytes(length // 100 * 100)


def test_what_is_deleted_twice_is_gone() -> None:
    store = store_module.MemoryStore()
    upload(store, URL, [b"abc"])
    delete(store, URL)
    delete(store, URL)
    with pytest.raises(FileNotFoundError):
        read(store)


def test_a_web_server_is_not_written_to() -> None:
    url = Url("https", "host.invalid", "folder/name")
    with pytest.raises(AccessError) as error:
        storage_of(url).write(url, b"content")
    assert error.value.path == str(url)
