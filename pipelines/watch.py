"""The watch over the ranks: who has come, what they say while they live, and who has gone.

Rank 0 keeps a line to every other rank, from before they meet until they part; over it go a few words
every other second, on a thread of their own, whatever the rank is computing. A line that ends without a
farewell, one that falls silent (a frozen process, a lost node), and a rank that is stuck in what
ought to be short (a file system that hangs) end the run: rank 0 says which rank and why, tells all,
and every process leaves. Without that a rank in a collective waits for one that has gone until a
timeout of many minutes, and does not know for whom.

How long it takes: at once where a process ends, SILENCE seconds where it falls silent, STALL where it
is stuck, and before the meeting the seconds that `Meeting` gives.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from pipelines.errors import UserError
from pipelines.rendezvous import Meeting

BEAT, SILENCE, STALL = 2.0, 40.0, 300.0
"""Seconds between words, after which a silent rank is taken for lost, and a busy one for stuck."""

_LEEWAY = 6.0
"""Seconds for ranks to leave by themselves, once one has left for what all of them may know."""

_FAREWELL = 15.0
"""Seconds for rank 0 to say why all leave, and to be gone; more than _LEEWAY."""

_ANSWER = 15.0
"""Seconds for whoever listens at a port to say that it is rank 0."""

_HALFWAY = 1.0
"""Seconds for a stranger at the door to end a message that it has begun."""

_LONGEST = 1 << 16
"""Bytes of a message; a stranger at the door that means something else asks for more."""


class Watch:
    """This rank's end of the watch; `begin` it, and `end` it when all goes well."""

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

    def part(self, reason: str, *, known: bool) -> None:
        """Say that this rank leaves, for `reason`, which it has told; others may have `known` it too."""
        raise NotImplementedError

    def await_word(self) -> None:
        """Wait for the word of who has gone, which ends this process; return if none comes."""
        self._thread.join(SILENCE + 4 * BEAT)

    def end(self) -> None:
        """All has gone well, and the ranks part; nothing where they have."""
        raise NotImplementedError

    def outlast_root(self) -> None:
        """Wait, behind `part` or `end`, until rank 0's process has ended, which takes it moments."""
        raise NotImplementedError

    def _attend(self) -> None:
        raise NotImplementedError

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


class Warden(Watch):
    """Rank 0's end: it calls the roll, listens to all, and passes judgement."""

    def __init__(self, meeting: Meeting, size: int) -> None:
        super().__init__(0, size)
        self._meeting = meeting
        _allow_files(size + 256)
        self._door: socket.socket | None = _listen(meeting, size)
        self._listening = selectors.DefaultSelector()
        self._listening.register(self._door, selectors.EVENT_READ)
        self._lines: dict[int, _Line] = {}
        self._last_came = time.monotonic()
        self._complete = threading.Event()
        self._lock = threading.Lock()
        self._thread.start()

    def begin(self, word: str) -> str:
        """Wait until all ranks are here, and give them `word`; the same word."""
        self._complete.wait()
        self._tell({"begin": word})
        return word

    def part(self, reason: str, *, known: bool) -> None:
        """See `Watch`."""
        self._ended.set()
        self._tell({"parted": reason, "known": known})

    def end(self) -> None:
        """See `Watch`."""
        if not self._ended.is_set():
            self._ended.set()
            self._tell({"end": True})
            self._thread.join(2 * BEAT)

    def outlast_root(self) -> None:
        """See `Watch`; rank 0 does not wait for itself."""

    def _tell(self, message: dict[str, Any]) -> None:
        with self._lock:
            for line in list(self._lines.values()):
                with contextlib.suppress(OSError):
                    _send(line.connection, message)
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
            _limit(stranger, _HALFWAY)
            self._listening.register(stranger, selectors.EVENT_READ)

    def _admit(self, stranger: Connection) -> None:
        """Let `stranger` in if it is one of this run's ranks."""
        self._listening.unregister(stranger)
        try:
            hello = _receive(stranger)
            if hello["key"] != self._meeting.key or not 0 < hello["rank"] < self._size:
                raise ValueError("another run's")
            rank, name = int(hello["rank"]), str(hello["name"])
            _send(stranger, {"welcome": self._name})
            _limit(stranger, SILENCE)
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
            message = _receive(line.connection)
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
                _send(line.connection, {})

    def _judge(self) -> None:
        """End the run if somebody has fallen silent, is stuck, has left, or does not come."""
        now = time.monotonic()
        if self._door and now - self._last_came > self._meeting.seconds:
            missing = [rank for rank in range(1, self._size) if rank not in self._lines]
            named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            self._condemn(
                f"{len(missing)} of {self._size} ranks have not come ({named}), and none in the last "
                f"{self._meeting.seconds:g} s"
            )
        if stuck := self._stuck():
            self._condemn(f"{self._name} {stuck} (does a file system hang?)")
        for line in self._lines.values():
            if line.parted is not None:
                reason, known = line.parted
                if not known or now - line.heard > _LEEWAY:
                    self._condemn(f"{line.name} has left: {reason}", told=not known)
            elif not line.over and now - line.heard > SILENCE:
                self._condemn(f"{line.name} has said nothing for {SILENCE:.0f} s (frozen, or its node lost?)")

    def _condemn(self, message: str, *, told: bool = False) -> NoReturn:
        # First of all: a launcher may end this process as soon as another has left.
        if not told:
            self._announce(message)
        self._tell({"leave": True})
        self._leave()


class Member(Watch):
    """Another rank's end: it says that it lives, and leaves when told to or when rank 0 has gone."""

    def __init__(self, meeting: Meeting, rank: int, size: int, *, speaks: bool) -> None:
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
        self._thread.join(2 * BEAT)
        with contextlib.suppress(OSError, ValueError):
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                _receive(self._connection)

    def _go(self, meeting: Meeting) -> Connection:
        hello = {"key": meeting.key, "rank": self._rank, "name": self._name}
        deadline, fault = time.monotonic() + meeting.seconds, "nobody answers"
        while time.monotonic() < deadline:
            for port in meeting.ports:
                try:
                    reached = socket.create_connection((meeting.address, port), timeout=_ANSWER)
                    reached.settimeout(None)
                    connection = Connection(reached.detach())
                    _limit(connection, _ANSWER)
                    _send(connection, hello)
                    if connection.poll(_ANSWER):
                        self._warden = _receive(connection)["welcome"]
                        _limit(connection, SILENCE)
                        return connection
                    connection.close()
                except (OSError, ValueError, KeyError) as error:
                    fault = str(error)
            time.sleep(0.2)
        ports = "-".join(str(port) for port in sorted({meeting.ports[0], meeting.ports[-1]}))
        raise UserError(
            f"rank 0 has not been at {meeting.address}, port {ports}, in "
            f"{meeting.seconds:g} s ({fault}); has it started, and can this node reach that one?"
        )

    def _say(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            _send(self._connection, message)

    def _attend(self) -> None:
        heard = time.monotonic()
        while not self._ended.is_set():
            try:
                while self._connection.poll(BEAT):
                    self._take(_receive(self._connection))
                    heard = time.monotonic()
            except (OSError, ValueError):
                self._lost("has died without a word (killed, out of memory, its node lost?)")
            if time.monotonic() - heard > SILENCE:
                self._lost(f"has said nothing for {SILENCE:.0f} s (frozen, or its node lost?)")
            self._say({"stuck": self._stuck()})

    def _take(self, message: dict[str, Any]) -> None:
        if "begin" in message:
            self._word = message["begin"]
            self._begun.set()
        elif "leave" in message:
            self._leave()
        elif "parted" in message:
            if message["known"]:
                self._ended.wait(_LEEWAY)
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
            time.sleep(BEAT)
        self._leave()


def _listen(meeting: Meeting, size: int) -> socket.socket:
    """A socket at the first of the meeting's ports that is free; UserError where none is."""
    last: OSError | None = None
    for port in meeting.ports:
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("127.0.0.1" if meeting.address == "127.0.0.1" else "", port))
            door.listen(size)
        except OSError as error:
            door.close()
            last = error
        else:
            return door
    raise UserError(
        f"rank 0 cannot listen at port {meeting.ports[-1]} ({last}); does another run use it? "
        "Set MASTER_PORT to another"
    )


def _allow_files(count: int) -> None:
    """Let this process have `count` files and lines open, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _limit(connection: Connection, seconds: float) -> None:
    """Have a message that stops halfway raise OSError after `seconds`, which are whole ones."""
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))


def _send(connection: Connection, message: dict[str, Any]) -> None:
    # Text, not pickled objects: whoever can reach the port shall not run code here.
    connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection) -> dict[str, Any]:
    """The next message; OSError at the line's end, ValueError where it makes no sense."""
    try:
        message = json.loads(connection.recv_bytes(_LONGEST))
    except EOFError as error:
        raise OSError("the line has ended") from error
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message
