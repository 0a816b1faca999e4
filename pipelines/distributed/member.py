"""Another rank's end of the watch; see `pipelines.distributed.watch`."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from pipelines.distributed import watch
from pipelines.distributed.rendezvous import Endpoint
from pipelines.distributed.wire import limit, receive, send
from pipelines.errors import UserError

_ANSWER = 15.0
"""Seconds for whoever listens at a port to say that it is rank 0."""

_FAREWELL = 30.0
"""Seconds for rank 0 to say why all leave, and to be gone; more than LEEWAY."""


class Member(watch.Watch):
    """Another rank's end: it says that it lives, and leaves when told to or when rank 0 has gone."""

    def __init__(self, meeting: Endpoint, rank: int, size: int, *, speaks: bool) -> None:
        """Go to the meeting; UserError where rank 0 does not come. `speaks`: of rank 0's end."""
        super().__init__(rank, size)
        self._speaks = speaks
        self._warden = "rank 0"
        self._word: str | None = None
        self._begun = threading.Event()
        self._connection = self._go(meeting)
        self._lock = threading.Lock()
        self._thread.start()

    def begin(self) -> str:
        """Wait until all ranks are here; the word that rank 0 gives them."""
        self._begun.wait()
        assert self._word is not None
        return self._word

    def part(self, reason: str, *, known: bool) -> None:
        """See `Watch`."""
        self._say({"parted": reason, "known": known})
        self._ended.set()

    def end(self) -> None:
        """See `Watch`."""
        if not self._ended.is_set():
            self._ended.set()
            self._say({"end": True})

    def outlast_root(self) -> None:
        """See `Watch`."""
        deadline = time.monotonic() + _FAREWELL
        self._thread.join(2 * watch.BEAT)
        with contextlib.suppress(OSError, ValueError):
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                receive(self._connection)

    def _go(self, meeting: Endpoint) -> Connection:
        hello = {"key": meeting.key, "rank": self._rank, "name": self._name}
        deadline, fault = time.monotonic() + meeting.timeout, "nobody answers"
        while time.monotonic() < deadline:
            for port in meeting.ports:
                try:
                    reached = socket.create_connection((meeting.address, port), timeout=_ANSWER)
                    reached.settimeout(None)
                    connection = Connection(reached.detach())
                    limit(connection, _ANSWER)
                    send(connection, hello)
                    if connection.poll(_ANSWER):
                        self._warden = receive(connection)["welcome"]
                        limit(connection, watch.SILENCE)
                        return connection
                    connection.close()
                except (OSError, ValueError, KeyError) as error:
                    fault = str(error)
            time.sleep(0.2)
        ports = "-".join(str(port) for port in sorted({meeting.ports[0], meeting.ports[-1]}))
        raise UserError(
            f"rank 0 has not been at {meeting.address}, port {ports}, in "
            f"{meeting.timeout:g} s ({fault}); has it started, and can this node reach that one?"
        )

    def _say(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            send(self._connection, message)

    def _attend(self) -> None:
        heard = time.monotonic()
        while not self._ended.is_set():
            try:
                while self._connection.poll(watch.BEAT):
                    self._take(receive(self._connection))
                    heard = time.monotonic()
            except (OSError, ValueError):
                self._lost("has died without a word (killed, out of memory, its node lost?)")
            if time.monotonic() - heard > watch.SILENCE:
                self._lost(f"has said nothing for {watch.SILENCE:.0f} s (frozen, or its node lost?)")
            self._say({"stuck": self._stuck()})

    def _take(self, message: dict[str, Any]) -> None:
        if "begin" in message:
            self._word = message["begin"]
            self._begun.set()
        elif "leave" in message:
            self._leave()
        elif "parted" in message:
            if message["known"]:
                self._ended.wait(watch.LEEWAY)
                self._lost(f"has left: {message['parted']}")
            self._leave()
        elif "end" in message:
            self._ended.set()

    def _lost(self, how: str) -> None:
        """Leave, since rank 0 has gone; not where this rank itself is just leaving."""
        if self._ended.is_set():
            return
        if self._speaks:
            self._announce(f"{self._warden} {how}")
        else:
            # A launcher may end them all when the first one leaves: let the one that speaks be heard.
            time.sleep(watch.BEAT)
        self._leave()
