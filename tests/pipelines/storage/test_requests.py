"""Requests are repeated, raced and given up as their answers and durations say."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from pipelines.errors import MissingError, StorageError
from pipelines.storage import requests
from pipelines.storage.location import Url
from pipelines.storage.requests import COUNTS, Requests

URL = Url("s3", "bucket", "key")


class AnswerError(Exception):
    """An error with the text of obstore's for an answer."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(
            f"Server returned non-2xx status code: {status} X: <Error><Code>{code}</Code></Error>"
        )


def answers(*each: Exception | float | str) -> Callable[[], Awaitable[str]]:
    """Return a request that raises, sleeps for a number of seconds, or answers, one after the other."""
    rest = iter(each)

    async def request() -> str:
        answer = next(rest)
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            return "late"
        if isinstance(answer, Exception):
            raise answer
        return answer

    return request


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_PAUSE", "_THROTTLED_PAUSE", "_LONGEST_PAUSE"):
        monkeypatch.setattr(requests, name, 0.01)
    monkeypatch.setattr(requests, "_RACE_SECONDS", 0.1)
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 0.5)
    monkeypatch.setattr(requests, "FIRST_DEADLINE_SECONDS", 0.2)


def test_temporary_failures_are_repeated_and_counted() -> None:
    before = replace(COUNTS)
    failures = (AnswerError(500), AnswerError(503, "SlowDown"), ConnectionResetError("reset by peer"))
    assert Requests().run(URL, answers(*failures, "content")) == "content"
    assert COUNTS.requests - before.requests == 4
    assert COUNTS.retries - before.retries == 3
    assert COUNTS.throttled - before.throttled == 1


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken"), (404, "NoSuchBucket"), (301, "")]
)
def test_refusals_are_final(status: int, code: str) -> None:
    before = COUNTS.requests
    with pytest.raises(StorageError) as raised:
        Requests().run(URL, answers(AnswerError(status, code)))
    assert raised.value.path == str(URL)
    assert COUNTS.requests - before == 1


def test_an_object_that_does_not_exist() -> None:
    with pytest.raises(MissingError):
        Requests().run(URL, answers(AnswerError(404, "NoSuchKey")))


def test_a_server_that_is_down_is_given_up_at_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(StorageError):
        Requests().run(URL, answers(*[ConnectionRefusedError("Connection refused")] * 100))
    assert time.monotonic() - start < 0.4
    # One that has answered before is given more time.
    known, start = Requests(), time.monotonic()
    known.run(URL, answers("content"))
    with pytest.raises(StorageError):
        known.run(URL, answers(*[ConnectionRefusedError("Connection refused")] * 100))
    assert 0.4 < time.monotonic() - start < 1


def test_credentials_that_cannot_be_renewed_are_told_apart() -> None:
    exceptions = pytest.importorskip("obstore.exceptions")
    with pytest.raises(StorageError) as raised:
        Requests().run(URL, answers(*[exceptions.UnauthenticatedError("External provider: sesame")] * 100))
    assert "credentials" in raised.value.fault and "sesame" not in str(raised.value)


def test_a_stalled_request_is_raced() -> None:
    start, before = time.monotonic(), COUNTS.raced
    assert Requests().run(URL, answers(20.0, "content")) == "content"
    assert COUNTS.raced - before == 1
    # Also if the second one fails, or stalls too.
    assert Requests().run(URL, answers(20.0, AnswerError(503), "content")) == "content"
    assert Requests().run(URL, answers(20.0, 20.0, "content")) == "content"
    assert time.monotonic() - start < 3


def test_requests_that_all_stall_end_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "REQUEST_SECONDS", 0.4)
    start = time.monotonic()
    with pytest.raises(StorageError):
        Requests().run(URL, answers(*[20.0] * 100))
    assert time.monotonic() - start < 2


def test_where_all_requests_are_slow_few_are_raced() -> None:
    before, server = COUNTS.raced, Requests()
    with ThreadPoolExecutor(20) as threads:
        each = [threads.submit(server.run, URL, answers(*[0.5] * 3)) for _ in range(20)]
        assert {one.result() for one in each} == {"late"}
    assert 0 < COUNTS.raced - before <= 5


def test_many_requests_one_after_the_other_are_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "REQUEST_SECONDS", 0.2)
    before = COUNTS.requests
    assert Requests().run(URL, answers(0.4), races=False) == "late"
    assert COUNTS.requests - before == 1


def test_a_forked_process_does_not_wait_for_its_parents_threads() -> None:
    Requests().run(URL, answers("content"))
    if not (child := os.fork()):
        signal.alarm(5)
        status = 1
        try:
            with pytest.raises(RuntimeError):
                Requests().run(URL, answers("content"))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_the_end_of_the_process_cancels_what_is_in_flight() -> None:
    # Otherwise an answer that comes while the interpreter shuts down aborts it, in a third of the cases.
    program = """
import asyncio, threading, time
from pipelines.storage.location import Url
from pipelines.storage.requests import Requests

sent = threading.Event()

async def request():
    try:
        sent.set()
        await asyncio.sleep(60)
    finally:
        print("cancelled", flush=True)

run = lambda: Requests().run(Url("s3", "bucket", "key"), request)
threading.Thread(target=run, daemon=True).start()
sent.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "cancelled\n")
