"""Fetch one file over HTTP, completely or not at all; an interrupted transfer resumes.

Until the file is complete, its content is in `<name>.part`, and the server's version of it (ETag or time of
change) in `<name>.part.tag`, so that another run asks for the rest of the same content.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from pipelines.errors import AccessError, DataError, writing
from pipelines.filesystem import free_space
from pipelines.formats.signatures import recognize_file

_CHUNK = 1 << 20
_ATTEMPTS = 5
"""Consecutive attempts without new content before giving up."""

_USER_AGENT = "cosmoflow-dali"
"""Some servers refuse the name that Python's library gives by itself."""

_TEMPORARY = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_EARLY, http.HTTPStatus.TOO_MANY_REQUESTS)
"""Refusals below 500 after which the same request may succeed (RFC 9110, 6585 and 8470)."""


class _TransferError(Exception):
    """The transfer broke off or the server sent something else; another attempt may succeed."""


def fetch(
    url: str, path: Path, *, sha256: str | None = None, shown: bool, timeout: float = 30.0, pause: float = 2.0
) -> None:
    """Fetch `url` to `path`, from where an earlier run stopped; `path` may be complete already.

    Args:
        url: Address of the file.
        path: Its place on the disk.
        sha256: Expected SHA-256 in hexadecimal; None accepts any content.
        shown: Show a progress bar.
        timeout: Seconds without data after which a connection counts as broken.
        pause: Seconds before the second attempt, doubled before each further one.

    Raises:
        DataError: The server refuses, breaks off too often, or sends other content than `sha256`.
        AccessError: The disk cannot be written.
    """
    part = path.with_name(path.name + ".part")
    failures = 0
    while not path.exists():
        before = _size(part)
        try:
            _fetch_rest(url, part, shown, timeout)
            break
        except _TransferError as error:
            failures = 0 if _size(part) > before else failures + 1
            if failures == _ATTEMPTS:
                fault = f"{error}, {_ATTEMPTS} times in a row"
                raise DataError(url, fault, "try again later: the transfer resumes") from error
            time.sleep(pause * 2**failures)
        except OSError as error:
            raise AccessError.writing(part, error) from error
    found = path if path.exists() else part
    if sha256 is not None and (digest := _sha256(found)) != sha256.lower():
        kind = recognize_file(found)
        with writing(found):
            found.unlink()
        fault = f"its SHA-256 is {digest}, not {sha256}" + (f"; it holds {kind}" if kind else "")
        raise DataError(url, fault, "fetch it again, or check the expected sum")
    with writing(path):
        found.replace(path)
        _tag(part).unlink(missing_ok=True)


def _fetch_rest(url: str, part: Path, shown: bool, timeout: float) -> None:
    """Append the missing content to `part`."""
    size = _size(part)
    headers = {"Accept-Encoding": "identity", "User-Agent": _USER_AGENT}
    request = urllib.request.Request(url, headers=headers)
    if size and _tag(part).exists() and (tag := _tag(part).read_text(encoding="latin-1")):
        request.add_header("Range", f"bytes={size}-")
        # If the file has changed since, the server sends all of the new one.
        request.add_header("If-Range", tag)
    with _network_errors(url, part):
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    with response:
        start, total = _content_range(response, size)
        space = free_space(part.parent)
        if space and total is not None and total - start > space[0]:
            fault = f"has {space[0]} bytes free, but the file needs {total - start}"
            raise DataError(part.parent, fault, "free some space, or choose another folder")
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        _tag(part).write_text(tag, encoding="latin-1")
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=not shown)
        with open(part, "r+b" if part.exists() else "wb") as file, bar:
            file.truncate(start)
            file.seek(start)
            while True:
                with _network_errors(url, part):
                    chunk = response.read1(_CHUNK)
                if not chunk:
                    break
                file.write(chunk)
                bar.update(len(chunk))
            size = file.tell()
    if total is not None and size < total:
        raise _TransferError(f"broke off after {size} of {total} bytes")


def _content_range(response: http.client.HTTPResponse, size: int) -> tuple[int, int | None]:
    """Return the offset at which the content of `response` starts, and the file's length if it is given."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != size:
            raise _TransferError("sends another part than requested")
        return size, int(found[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdecimal() else None


@contextlib.contextmanager
def _network_errors(url: str, part: Path) -> Iterator[None]:
    """Raise _TransferError, or DataError where another attempt is useless, for errors of the connection."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()  # It is longer than the file, so it is of something else.
        elif error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in _TEMPORARY:
            raise DataError(url, f"answers {error.code} {error.reason}", "check the address") from error
        raise _TransferError(f"answers {error.code} {error.reason}") from error
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise _TransferError(f"connection failed ({reason})") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
