"""Uploads: objects that appear whole or not at all, checked by the store, failed requests repeated."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import crc32c

from pipelines.errors import AccessError
from pipelines.io import WrittenFile
from pipelines.storage.answers import explain
from pipelines.storage.location import Url
from pipelines.storage.requests import wait_for
from pipelines.storage.stores import UPLOAD_RETRIES

PART_BYTES = 8 << 20
"""Length of a part of a stream: 10,000 of them, as many as S3 takes, are 80 GB."""

_PARTS_AT_A_TIME = 2
"""Parts in flight, which are held in memory: one is sent while the next one is made."""

_SINGLE_BYTES = 64 << 20
"""Length up to which content that is in memory is sent in one request."""

_INTERRUPTED = ("BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload")
"""Codes of S3 for content that was damaged on its way, and for an upload whose last answer was lost."""

_EXHAUSTED = re.compile(rf"(?<!max_)retries: {UPLOAD_RETRIES}\b")
"""Part of the text of an error after obstore has repeated the request for a minute."""

_ATTEMPTS = 5
"""Attempts with what obstore does not repeat: damaged content, answers that break off, removals."""


class InterruptedUploadError(AccessError):
    """An upload in parts that broke off; it may succeed if all pieces are made again."""


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
    _repeat(url, "written", lambda: obstore.put_async(store, url.key, content, use_multipart=False))
    return WrittenFile(url, len(content), crc32c.crc32c(content))


def upload_stream(store: Any, url: Url, pieces: Iterable[bytes | memoryview]) -> WrittenFile:
    """Upload `pieces`, consumed one by one, to `url`, in parts; see `upload`.

    An exception from them is raised as it is: the upload is aborted, and its parts are removed.

    Raises:
        InterruptedUploadError: Another attempt may succeed.
        AccessError: The store refuses.
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
        kind = InterruptedUploadError if _is_temporary(error) else AccessError
        raise _refused(url, error, "written", kind) from error
    return WrittenFile(url, length, checksum)


def delete(store: Any, url: Url) -> None:
    """Delete the object at `url`, if there is one; see `upload`."""
    import obstore

    _repeat(url, "removed", lambda: obstore.delete_async(store, url.key))


def _repeat(url: Url, done: str, request: Callable[[], Awaitable[object]]) -> None:
    """Send `request`, again if it may succeed then; `done` is what it does, for errors."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            wait_for(request)
            return
        except Exception as error:
            if done == "removed" and explain(error).kind == "missing":
                return
            if attempt == _ATTEMPTS or not _is_temporary(error):
                raise _refused(url, error, done) from error
        time.sleep(attempt * random.uniform(0.05, 0.15))


def _is_temporary(error: Exception) -> bool:
    interrupted = explain(error).kind == "temporary" or any(code in str(error) for code in _INTERRUPTED)
    return interrupted and not _EXHAUSTED.search(str(error))


def _refused(url: Url, error: Exception, done: str, kind: type[AccessError] = AccessError) -> AccessError:
    refusal = explain(error)
    return kind(url, f"cannot be {done}: {refusal.fault}", refusal.remedy)
