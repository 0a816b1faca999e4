"""Requests to one server: repeated when they fail, raced by a second one when they stall, counted.

All of a process run on one event loop, in a thread of its own; callers wait for their result.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from pipelines.errors import MissingError, StorageError, UserError
from pipelines.storage.answers import Refusal, explain
from pipelines.storage.location import Url
from pipelines.storage.stores import REQUEST_SECONDS

DEADLINE_SECONDS = 60.0
"""Duration after which what cannot be read is given up."""

FIRST_DEADLINE_SECONDS = 15.0
"""The same for a server that has not answered this process yet: its address is probably wrong."""

_FIRST_PAUSE, _LONGEST_PAUSE, _THROTTLED_PAUSE = 0.1, 5.0, 0.5
"""Seconds before a request is repeated: doubled each time, up to the longest, times a random number."""

_RACE_SECONDS, _RACE_FACTOR, _MOST_RACERS = 1.0, 4.0, 2
"""A request that takes longer than this, and than this multiple of the usual duration, is raced by another
one, and after as long again by a last one."""

_FEWEST_RACERS, _RACERS_PART = 4, 4
"""So many racers are sent at a time, or one for so many requests in flight: where most take long, the line or
the server is slow, and further requests would make it slower."""

_WEIGHT = 0.1
"""Weight of the latest request in the moving average of durations."""

_STOP_SECONDS = 5.0
"""Duration for which the end of the process waits for requests that it has cancelled."""

_Answer = TypeVar("_Answer")


@dataclass
class TransferCounts:
    """Counts of this process.

    Attributes:
        requests: Requests that were sent, with repeated and raced ones.
        bytes: Bytes received of contents.
        retries: Requests repeated after an error, or because what they brought was damaged.
        throttled: Answers that asked for fewer requests.
        raced: Second requests beside stalled ones.
        cache_hits, cache_bytes: Reads, and their bytes, that the node's cache answered.
    """

    requests: int = 0
    bytes: int = 0
    retries: int = 0
    throttled: int = 0
    raced: int = 0
    cache_hits: int = 0
    cache_bytes: int = 0


COUNTS = TransferCounts()


class Requests:
    """Requests to one server.

    Attributes:
        seconds: Moving average of the durations of requests for contents; None before the first.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._reached = False
        self._in_flight = self._racers = 0

    def run(self, url: Url, request: Callable[[], Awaitable[_Answer]], *, races: bool = True) -> _Answer:
        """Return the answer of `request`, repeated until the deadline.

        Args:
            url: What it is about, for errors.
            request: Sends it; may be called several times, also while another one waits.
            races: Send another one while it stalls. False for many requests one after the other.

        Raises:
            MissingError: There is no such object.
            StorageError: The server refuses, or does not answer before the deadline.
        """
        loop = _event_loop()
        return asyncio.run_coroutine_threadsafe(self._repeat(url, request, races), loop).result()

    async def _repeat(self, url: Url, request: Callable[[], Awaitable[_Answer]], races: bool) -> _Answer:
        start, attempts = time.monotonic(), 0
        while True:
            try:
                answer = await (self._race(request) if races else self._send(request))
                self._reached = True
                return answer
            except UserError:
                raise
            except Exception as error:
                refusal = explain(error)
                if refusal.kind != "temporary":
                    raise _error(url, refusal) from error
                attempts += 1
                pause = _THROTTLED_PAUSE if refusal.throttled else _FIRST_PAUSE
                pause = min(pause * 2 ** (attempts - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.5)
                self._reached |= refusal.throttled
                seconds = time.monotonic() - start
                limit = DEADLINE_SECONDS if self._reached else FIRST_DEADLINE_SECONDS
                if seconds + pause > limit:
                    fault = f"cannot be read: {refusal.fault} ({attempts} attempts in {seconds:.0f} s)"
                    raise StorageError(url, fault, refusal.remedy) from error
                COUNTS.retries += 1
                COUNTS.throttled += refusal.throttled
                await asyncio.sleep(pause)

    async def _race(self, request: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Return the first answer of a request, and of further ones beside it while it stalls."""
        start, racers = time.monotonic(), 0
        patience = max(_RACE_SECONDS, _RACE_FACTOR * (self.seconds or 0.0))
        running = {self._send(request)}
        self._in_flight += 1
        try:
            while True:
                done, running = await asyncio.wait(
                    running, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                taken = time.monotonic() - start
                # Of those that end together, an answer comes first.
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    # A failure waits for the other requests, if there are any.
                    if task.exception() is None or not running:
                        answer = task.result()
                        self.seconds = (
                            taken if self.seconds is None else self.seconds + _WEIGHT * (taken - self.seconds)
                        )
                        return answer
                if taken > REQUEST_SECONDS:
                    raise TimeoutError
                most = max(_FEWEST_RACERS, self._in_flight // _RACERS_PART)
                if not done and racers < _MOST_RACERS and self._racers < most:
                    COUNTS.raced += 1
                    self._racers, racers = self._racers + 1, racers + 1
                    running.add(self._send(request))
        finally:
            self._in_flight, self._racers = self._in_flight - 1, self._racers - racers
            for task in running:
                task.cancel()

    @staticmethod
    def _send(request: Callable[[], Awaitable[_Answer]]) -> asyncio.Task[_Answer]:
        COUNTS.requests += 1

        async def send() -> _Answer:
            return await request()

        return asyncio.get_running_loop().create_task(send())


def _error(url: Url, refusal: Refusal) -> UserError:
    if refusal.kind == "missing":
        return MissingError(url, refusal.fault, refusal.remedy)
    return StorageError(url, f"cannot be read: {refusal.fault}", refusal.remedy)


def wait_for(request: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """Return the answer of `request`, sent once in the thread of all requests.

    Unlike with obstore's functions that are not asynchronous, the caller may be one of obstore's threads.
    """

    async def send() -> _Answer:
        return await request()

    loop = _event_loop()
    return asyncio.run_coroutine_threadsafe(send(), loop).result()


def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all requests of this process."""
    process, loop = _started_loop()
    if process != os.getpid():
        # It would wait for ever: neither this loop's thread nor those of obstore are copied.
        raise RuntimeError("a process that has sent requests was forked: spawn it instead")
    return loop


@functools.cache
def _started_loop() -> tuple[int, asyncio.AbstractEventLoop]:
    """Start an event loop in a thread; return the number of the process and the loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="requests", daemon=True)
    thread.start()
    atexit.register(_stop, os.getpid(), loop, thread)
    return os.getpid(), loop


def _stop(process: int, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Cancel what is in flight: an answer for an interpreter that shuts down would abort the process."""
    if process != os.getpid():
        return

    async def cancel() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        loop.stop()

    asyncio.run_coroutine_threadsafe(cancel(), loop)
    thread.join(timeout=_STOP_SECONDS)
