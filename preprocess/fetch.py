"""Fetch one file over HTTP: whatever the connection does, whole or not at all.

What has arrived lies beside the file as `<name>.part`, and what the server called it (its ETag or
time of change) as `<name>.part.tag`, so that another run asks for the rest of the same content.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipelines.errors import AccessError, DataError

_CHUNK = 1 << 20
_ATTEMPTS = 5
"""Tries in a row that bring nothing new."""


class _BrokenError(Exception):
    """The connection, or what came over it, is not what was promised; another try may be luckier."""


class _Offer(NamedTuple):
    """What a response brings: content from byte `start` on, of `total` bytes if it says so."""

    start: int
    total: int | None
    tag: str


def fetch(
    url: str, path: Path, *, sha256: str | None = None, shown: bool, timeout: float = 30.0, pause: float = 2.0
) -> None:
    """Fetch `url` to `path`, going on with what an earlier run has left, which may be all of it.

    timeout: seconds of silence after which a connection counts as broken.
    pause: seconds before the second try, doubled before each further one.

    DataError, naming the URL, for a server that refuses, breaks off too often, or sends something
    else than `sha256` says; AccessError for a disk that does not take it.
    """
    if path.exists():
        _check_sum(url, path, sha256)
        return
    part = path.with_name(path.name + ".part")
    fruitless = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part, shown, timeout)
            break
        except _BrokenError as error:
            after = part.stat().st_size if part.exists() else 0
            fruitless = 0 if after > before else fruitless + 1
            if fruitless == _ATTEMPTS:
                raise DataError(
                    url, f"{error}, {_ATTEMPTS} times in a row", "try again later: it goes on"
                ) from error
            time.sleep(pause * 2**fruitless)
        except OSError as error:
            raise AccessError.writing(part, error) from error
    _check_sum(url, part, sha256)
    part.replace(path)
    _tag(part).unlink(missing_ok=True)


def _fetch_rest(url: str, part: Path, shown: bool, timeout: float) -> None:
    """Append to `part` what it lacks; _BrokenError where less arrives than was promised."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    tag = _tag(part).read_text() if _tag(part).exists() else ""
    if have and tag:
        request.add_header("Range", f"bytes={have}-")
        # If the file has changed since, the whole of the new one comes.
        request.add_header("If-Range", tag)
    with _open(url, part, request, timeout) as response:
        offer = _offer(response, have)
        _check_space(part, offer)
        _tag(part).write_text(offer.tag)
        bar = tqdm(total=offer.total, initial=offer.start, unit="B", unit_scale=True, disable=not shown)
        with open(part, "r+b" if part.exists() else "wb") as file, bar:
            file.truncate(offer.start)
            file.seek(offer.start)
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
            have = file.tell()
    if offer.total is not None and have < offer.total:
        raise _BrokenError(f"broke off after {have} of {offer.total} bytes")


def _open(url: str, part: Path, request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"answers {error.code} {error.reason}"
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            # There is nothing behind what is here: it is of something else.
            part.unlink()
            raise _BrokenError("has less than was fetched of it") from error
        if error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise _BrokenError(answer) from error
        raise DataError(url, answer, "check the address") from error
    except urllib.error.URLError as error:
        raise _BrokenError(f"cannot be reached ({error.reason})") from error
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenError(f"answers nothing sensible ({error or type(error).__name__})") from error
    return response


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenError(f"broke off ({error or type(error).__name__})") from error


def _offer(response: http.client.HTTPResponse, have: int) -> _Offer:
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            raise _BrokenError("sends another part than was asked for")
        return _Offer(have, int(found[2]), tag)
    length = response.headers.get("Content-Length")
    return _Offer(0, int(length) if length and length.isdecimal() else None, tag)


def _check_space(part: Path, offer: _Offer) -> None:
    free = shutil.disk_usage(part.parent).free
    if offer.total is not None and offer.total - offer.start > free:
        fault = f"has {free} bytes free, and {offer.total - offer.start} are to come"
        raise DataError(part.parent, fault, "make room, or choose another folder")


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _check_sum(url: str, path: Path, sha256: str | None) -> None:
    """DataError, and no `path` any more, where that is not what `sha256` says."""
    if sha256 is not None and (found := _sha256(path)) != sha256.lower():
        path.unlink()
        raise DataError(
            url, f"its SHA-256 is {found}, not {sha256}", "fetch it again, or ask who gave the sum"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
