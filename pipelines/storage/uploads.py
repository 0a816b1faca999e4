"""Uploads: objects that appear whole or not at all, checked by the store, failed requests repeated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import crc32c

from pipelines.errors import AccessError
from pipelines.io import WrittenFile
from pipelines.storage.answers import explain
from pipelines.storage.location import Url
from pipelines.storage.requests import wait_for

PART_BYTES = 8 << 20
"""Length of a part of a stream: 10,000 of them, as many as S3 takes, are 80 GB."""

_PARTS_AT_A_TIME = 2
"""Parts in flight, which are held in memory: one is sent while the next one is made."""

_SINGLE_BYTES = 64 << 20
"""Length up to which content that is in memory is sent in one request."""

_DAMAGED = ("BadDigest", "XAmzContentSHA256Mismatch")
"""Codes of S3 for content that was damaged on its way."""

_TRANSFERS = 3


def upload(store: Any, url: Url, chunks: Iterable[bytes | memoryview]) -> WrittenFile:
    """Upload `chunks` in order to `url`.

    Args:
        store: Client of obstore that repeats requests.

    Raises:
        AccessError: The store refuses, or cannot be reached.
    """
    import obstore

    content = b"".join(chunks)
    if len(content) > _SINGLE_BYTES:
        return upload_stream(store, url, [content])
    for transfer in range(_TRANSFERS):
        try:
            wait_for(lambda: obstore.put_async(store, url.key, content, use_multipart=False))
            break
        except Exception as error:
            if transfer == _TRANSFERS - 1 or not any(code in str(error) for code in _DAMAGED):
                raise _refused(url, error) from error
    return WrittenFile(url, len(content), crc32c.crc32c(content))


def upload_stream(store: Any, url: Url, pieces: Iterable[bytes | memoryview]) -> WrittenFile:
    """Upload `pieces`, consumed one by one, to `url`, in parts; see `upload`.

    An exception from them is raised as it is: the upload is aborted, and its parts are removed.
    """
    import obstore

    length = checksum = 0
    failures: list[Exception] = []

    def measured() -> Iterator[bytes | memoryview]:
        nonlocal length, checksum
        try:
            for piece in pieces:
                length, checksum = length + len(piece), crc32c.crc32c(piece, checksum)
                yield piece
        except Exception as error:
            failures.append(error)
            raise

    rest = measured()
    start: list[bytes | memoryview] = []
    while length < PART_BYTES:
        piece = next(rest, None)
        if piece is None:
            # One request, and not three.
            return upload(store, url, start)
        start.append(piece)
    try:
        obstore.put(
            store,
            url.key,
            chain(start, rest),
            chunk_size=PART_BYTES,
            max_concurrency=_PARTS_AT_A_TIME,
            use_multipart=True,
        )
    except Exception as error:
        if failures:
            raise failures[0] from None
        raise _refused(url, error) from error
    return WrittenFile(url, length, checksum)


def delete(store: Any, url: Url) -> None:
    """Delete the object at `url`, if there is one; see `upload`."""
    import obstore

    try:
        wait_for(lambda: obstore.delete_async(store, url.key))
    except FileNotFoundError:
        return
    except Exception as error:
        raise _refused(url, error, "removed") from error


def _refused(url: Url, error: BaseException, done: str = "written") -> AccessError:
    refusal = explain(error)
    return AccessError(url, f"cannot be {done}: {refusal.fault}", refusal.remedy)
