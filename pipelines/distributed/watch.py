"""The watch over the ranks: who has come, what they say while they live, and who has gone.

Rank 0 keeps a line to every other rank, from before they meet until they part; over it go a few words
every other second, on a thread of their own, whatever the rank is computing. A line that ends without a
farewell, one that falls silent (a frozen process, a lost node), and a rank that is stuck in what
ought to be short (a file system that hangs) end the run: rank 0 says which rank and why, tells all,
and every process leaves. Without that a rank in a collective waits for one that has gone until a
timeout of many minutes, and does not know for whom.

How long it takes: at once where a process ends, SILENCE seconds where it falls silent, STALL where it
is stuck, and before the meeting the seconds that `Endpoint` gives.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NoReturn

BEAT, SILENCE, STALL = 2.0, 40.0, 300.0
"""Seconds between words, after which a silent rank is taken for lost, and a busy one for stuck."""

LEEWAY = 6.0
"""Seconds for ranks to leave by themselves, once one has left for what all of them may know."""


class Watch(ABC):
    """This rank's end of the watch, which begins when it is made; `end` it when all goes well."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._busy: tuple[str, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._attend, name="watch", daemon=True)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """While the body runs, the rank is about `what`, which ought to take less than STALL seconds."""
        self._busy = (what, time.monotonic())
        try:
            yield
        finally:
            self._busy = None

    @abstractmethod
    def part(self, reason: str, *, known: bool) -> None:
        """Say that this rank leaves, for `reason`, which it has told; others may have `known` it too."""

    def await_word(self) -> None:
        """Wait for the word of who has gone, which ends this process; return if none comes."""
        self._thread.join(SILENCE + 4 * BEAT)

    @abstractmethod
    def end(self) -> None:
        """All has gone well, and the ranks part; nothing where they have."""

    @abstractmethod
    def outlast_root(self) -> None:
        """Wait, after `part` or `end`, until rank 0's process has ended, which takes it moments."""

    @abstractmethod
    def _attend(self) -> None:
        """What the thread does: listen, and say that this rank lives."""

    def _stuck(self) -> str | None:
        """What this rank has been about for too long, if anything."""
        busy = self._busy
        if busy is None or (seconds := time.monotonic() - busy[1]) < STALL:
            return None
        return f"has been {busy[0]} for {seconds:.0f} s"

    def _announce(self, message: str) -> None:
        """Say that the run ends, and why; not through sys.stderr, whose lock a thread that hangs may hold."""
        way_out = "the others leave; start it again, with --resume where it trains"
        os.write(2, f"error: {message}; {way_out}\n".encode())

    def _leave(self) -> NoReturn:
        """End this process, whatever its other threads wait for."""
        os._exit(1)
