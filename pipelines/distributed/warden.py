"""Rank 0's end of the watch; see `pipelines.distributed.watch`."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from pipelines.distributed import watch
from pipelines.distributed.rendezvous import Endpoint
from pipelines.distributed.wire import limit, listen, receive, send

_HALFWAY = 1.0
"""Seconds for a stranger at the door to end a message that it has begun."""


@dataclass
class _Line:
    """Rank 0's line to another rank.

    name: for a person. heard: when it last said something.
    parted: why it leaves, and whether the others may know that too.
    over: whether nothing more is to come.
    """

    connection: Connection
    name: str
    heard: float = field(default_factory=time.monotonic)
    parted: tuple[str, bool] | None = None
    over: bool = False


class Warden(watch.Watch):
    """Rank 0's end: it calls the roll, listens to all, and passes judgement."""

    def __init__(self, meeting: Endpoint, size: int) -> None:
        super().__init__(0, size)
        self._meeting = meeting
        # A GPU check without a set-up has no crc32c, and reads no files.
        from pipelines.io import raise_open_file_limit

        raise_open_file_limit(size + 256)
        self._door: socket.socket | None = listen(meeting, size)
        self._listening = selectors.DefaultSelector()
        self._listening.register(self._door, selectors.EVENT_READ)
        self._lines: dict[int, _Line] = {}
        self._last_came = time.monotonic()
        self._complete = threading.Event()
        self._lock = threading.Lock()
        self._thread.start()

    def begin(self, word: str) -> None:
        """Wait until all ranks are here, and give them `word`."""
        self._complete.wait()
        self._tell({"begin": word})

    def part(self, reason: str, *, known: bool) -> None:
        """See `Watch`."""
        self._ended.set()
        self._tell({"parted": reason, "known": known})

    def end(self) -> None:
        """See `Watch`."""
        if not self._ended.is_set():
            self._ended.set()
            self._tell({"end": True})
            self._thread.join(2 * watch.BEAT)

    def outlast_root(self) -> None:
        """See `Watch`; rank 0 does not wait for itself."""

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            for line in list(self._lines.values()):
                with contextlib.suppress(OSError):
                    send(line.connection, message)
        # What was said last should be on its way before the lines end with this process.
        time.sleep(0.1)

    def _attend(self) -> None:
        judged = time.monotonic()
        while not self._ended.is_set():
            for key, _ in self._listening.select(1.0):
                if key.fileobj is self._door:
                    self._open()
                elif isinstance(key.fileobj, Connection):
                    self._admit(key.fileobj) if key.data is None else self._hear(key.data)
            if time.monotonic() - judged > 1.0:
                self._judge()
                judged = time.monotonic()

    def _open(self) -> None:
        assert self._door is not None
        with contextlib.suppress(OSError):
            taken, _ = self._door.accept()
            stranger = Connection(taken.detach())
            limit(stranger, _HALFWAY)
            self._listening.register(stranger, selectors.EVENT_READ)

    def _admit(self, stranger: Connection) -> None:
        """Let `stranger` in if it is one of this run's ranks."""
        self._listening.unregister(stranger)
        try:
            hello = receive(stranger)
            if hello["key"] != self._meeting.key or not 0 < hello["rank"] < self._size:
                raise ValueError("another run's")
            rank, name = int(hello["rank"]), str(hello["name"])
            send(stranger, {"welcome": self._name})
            limit(stranger, watch.SILENCE)
        except (OSError, ValueError, KeyError, TypeError):
            stranger.close()
            return
        if rank in self._lines and self._lines[rank].name != name:
            self._condemn(f"{self._lines[rank].name} and {name} both say that they are rank {rank}")
        self._lines[rank] = _Line(stranger, name)
        self._listening.register(stranger, selectors.EVENT_READ, rank)
        self._last_came = time.monotonic()
        if len(self._lines) == self._size - 1 and self._door:
            self._listening.unregister(self._door)
            self._door.close()
            self._door = None
            self._complete.set()

    def _hear(self, rank: int) -> None:
        line = self._lines[rank]
        try:
            message = receive(line.connection)
        except (OSError, ValueError):
            line.over = True
            self._listening.unregister(line.connection)
            with self._lock:
                line.connection.close()
            if self._door:
                # It may come again; if it has died, it is missed when the roll is called.
                del self._lines[rank]
            elif line.parted is None and not self._ended.is_set():
                self._condemn(f"{line.name} has died without a word (killed, out of memory, its node lost?)")
            return
        line.heard = time.monotonic()
        if "end" in message:
            # The line stays open: its end tells that this process has gone.
            line.over = True
            self._listening.unregister(line.connection)
        elif "parted" in message:
            line.parted = message["parted"], message["known"]
        elif message.get("stuck"):
            self._condemn(f"{line.name} {message['stuck']} (does a file system hang?)")
        else:
            # An answer that does not arrive is no news: the line's end comes as such.
            with self._lock, contextlib.suppress(OSError):
                send(line.connection, {})

    def _judge(self) -> None:
        """End the run if somebody has fallen silent, is stuck, has left, or does not come."""
        now = time.monotonic()
        if self._door and now - self._last_came > self._meeting.timeout:
            missing = [rank for rank in range(1, self._size) if rank not in self._lines]
            named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            self._condemn(
                f"{len(missing)} of {self._size} ranks have not come ({named}), and none in the last "
                f"{self._meeting.timeout:g} s"
            )
        if stuck := self._stuck():
            self._condemn(f"{self._name} {stuck} (does a file system hang?)")
        for line in self._lines.values():
            if line.parted is not None:
                reason, known = line.parted
                if not known or now - line.heard > watch.LEEWAY:
                    self._condemn(f"{line.name} has left: {reason}", told=not known)
            elif not line.over and now - line.heard > watch.SILENCE:
                silent = f"has said nothing for {watch.SILENCE:.0f} s"
                self._condemn(f"{line.name} {silent} (frozen, or its node lost?)")

    def _condemn(self, message: str, *, told: bool = False) -> NoReturn:
        # First of all: a launcher may end this process as soon as another has left.
        if not told:
            self._announce(message)
        self._tell({"leave": True})
        self._leave()
