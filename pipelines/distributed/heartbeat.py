"""Failure detector: heartbeats of all ranks in a TCPStore that rank 0 hosts.

A thread of every rank posts a record each HEARTBEAT_INTERVAL seconds: a counter, its name (rank, process and
host), and the operation that it is stuck in. Rank 0 reads all records. If a rank's counter stands still, or a
rank is stuck or reports a failure, rank 0 prints the rank and the reason and publishes the failure in its own
record, which all ranks read; then every process exits. If rank 0 fails, one rank of each node prints it.
Without this, ranks in a collective wait many minutes for one that has failed, and cannot name it.

Records are JSON, not pickled objects: a process that can reach the port must not be able to run code here.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pipelines.distributed.environment import integer
from pipelines.distributed.rendezvous import Endpoint
from pipelines.distributed.world import World
from pipelines.errors import printable

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_LATE_BEATS = 3
"""Missed heartbeats after which rank 0 tests if the process still exists. Ranks have as long to exit by
themselves after an error that all of them have seen."""

_PROBE_TIMEOUT = 0.5
"""Seconds of that test. A host that is up answers in milliseconds."""

_ROOT_EXIT_TIMEOUT = 30.0
"""Longest wait for rank 0 to print an error that all ranks have seen, and to exit."""

_CONNECTION_LOST = "connection lost; the process probably crashed or was killed"


class HeartbeatTiming(NamedTuple):
    """Seconds between heartbeats, until a rank without any is frozen, and until a busy one is stuck."""

    interval: int
    timeout: int
    stall: int

    @staticmethod
    def read(environ: Mapping[str, str], size: int) -> HeartbeatTiming:
        """Return HEARTBEAT_INTERVAL, HEARTBEAT_TIMEOUT and STALL_TIMEOUT for `size` ranks.

        Raises:
            ConfigError: One is not a whole number of seconds.
        """
        # A longer interval limits what the heartbeats of thousands of ranks cost rank 0.
        interval = integer(environ, "HEARTBEAT_INTERVAL", min(5, max(2, size // 1000)), least=1)
        timeout, stall = integer(environ, "HEARTBEAT_TIMEOUT", 40), integer(environ, "STALL_TIMEOUT", 300)
        return HeartbeatTiming(interval, timeout, stall)


class FailureDetector(ABC):
    """One rank's part of the failure detector; it runs until `end` or `report_failure`."""

    _root_runs = True
    _address: tuple[str, int] | None = None
    """Host and port that refuse connections once this process has ended."""

    def __init__(self, store: TCPStore, rank: int, timing: HeartbeatTiming) -> None:
        """Start to post heartbeats with `store`, a connection that nothing else uses."""
        self._store, self._key, self._timing = store, f"heartbeat/{rank}", timing
        self._beat, self._posted = 0, ""
        self._name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._operation: tuple[str, float] | None = None
        self._problem: str | None = None
        self._failure: tuple[str, bool] | None = None
        self._ended, self._stopped = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    @contextlib.contextmanager
    def stall_guard(self, operation: str | None) -> Iterator[None]:
        """Report `operation` if the body takes longer than STALL_TIMEOUT; None suspends an outer guard."""
        outer = self._operation
        self._operation = (operation, time.monotonic()) if operation else None
        try:
            yield
        finally:
            self._operation = (outer[0], time.monotonic()) if outer else None

    def end(self) -> None:
        """Stop, after all ranks have finished their work."""
        self._ended.set()

    def report_failure(self, reason: str, *, seen_by_all_ranks: bool) -> None:
        """Publish that this rank exits for `reason`, which it has printed unless all ranks have seen it."""
        self._failure = reason, seen_by_all_ranks
        self._ended.set()
        self._stopped.wait(_LATE_BEATS * self._timing.interval)

    def wait_for_failure_report(self) -> None:
        """Wait until a failure is reported, which ends this process; return if none is."""
        time.sleep(self._timing.timeout + 2 * _LATE_BEATS * self._timing.interval)

    def _run(self) -> None:
        # The store raises RuntimeError if rank 0 has ended, and prints a stack trace.
        with contextlib.suppress(RuntimeError):
            while not self._ended.is_set() and self._root_runs:
                self._post()
                self._check()
                self._ended.wait(self._timing.interval)
            if self._root_runs:
                self._post()
        self._stopped.set()

    def _post(self) -> None:
        self._beat += 1
        record = {
            "beat": self._beat,
            "name": self._name,
            "address": self._address,
            "problem": self._problem or self._stuck(),
            "failure": self._failure,
            "ended": self._ended.is_set(),
        }
        text = json.dumps(record)
        self._posted = self._store.compare_set(self._key, self._posted, text).decode()
        if self._posted != text:
            self._problem = f"{json.loads(self._posted)['name']} has the same rank"
            self._post()

    @abstractmethod
    def _check(self) -> None:
        """Read what other ranks have posted; end this process if one has failed."""

    def _stuck(self) -> str | None:
        """Return a message if this rank's operation takes too long."""
        operation = self._operation
        if operation is None or (seconds := time.monotonic() - operation[1]) < self._timing.stall:
            return None
        return f"stuck for {seconds:.0f} s in {operation[0]} (does a file system hang?)"

    def _no_heartbeat(self) -> str:
        return f"no heartbeat for {self._timing.timeout} s (frozen, or its node is lost)"

    def _print(self, message: str) -> None:
        """Print why the run ends, not through sys.stderr, whose lock a thread that hangs may hold."""
        line = printable(f"error: {message}; all ranks exit; restart with --resume if it was training")
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())


@dataclass
class _RankState:
    """The newest record of a rank, the number of checks since it came, and the name in the first record."""

    record: bytes = b""
    missed: int = 0
    name: str = ""


class HeartbeatServer(FailureDetector):
    """The failure detector of rank 0, which checks all ranks and publishes failures."""

    def __init__(self, store: TCPStore, endpoint: Endpoint, world: World, timing: HeartbeatTiming) -> None:
        """Start; from then on other ranks find the key of `endpoint` in `store`."""
        self._ranks = {rank: _RankState() for rank in range(1, world.size)}
        self._keys = [f"heartbeat/{rank}" for rank in self._ranks]
        self._connect_timeout, self._waited = endpoint.timeout, 0.0
        # To read a key that does not exist would block.
        for key in self._keys:
            store.set(key, "")
        super().__init__(store, 0, timing)
        store.set(endpoint.key, "")

    def report_failure(self, reason: str, *, seen_by_all_ranks: bool) -> None:
        """See `FailureDetector`; return when all ranks have read it, or a few seconds later."""
        super().report_failure(reason, seen_by_all_ranks=seen_by_all_ranks)
        deadline = time.monotonic() + _LATE_BEATS * self._timing.interval
        while time.monotonic() < deadline:
            if all(json.loads(text)["ended"] for text in self._store.multi_get(self._keys) if text):
                return
            time.sleep(0.1)

    def _check(self) -> None:
        self._waited += self._timing.interval
        if stuck := self._stuck():
            self._abort(f"{self._name}: {stuck}")
        probes = True
        for state, text in zip(self._ranks.values(), self._store.multi_get(self._keys), strict=True):
            state.missed = state.missed + 1 if text == state.record else 0
            state.record = text
            if text:
                probes = self._check_rank(state, json.loads(text), probes)
        missing = [str(rank) for rank, state in self._ranks.items() if not state.record]
        if missing and self._waited >= self._connect_timeout:
            named = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            count = f"{len(missing)} of {len(self._ranks) + 1} ranks did not connect ({named})"
            self._abort(f"{count}, and none in the last {self._connect_timeout:g} s")

    def _check_rank(self, state: _RankState, record: dict[str, Any], probes: bool) -> bool:
        """End the run if a rank has failed; return False if `probes` is, or its host does not answer."""
        if not state.name:
            state.name, self._waited = record["name"], 0.0
        silent = state.missed * self._timing.interval
        if record["failure"]:
            reason, seen_by_all_ranks = record["failure"]
            if not seen_by_all_ranks or state.missed >= _LATE_BEATS:
                self._abort(f"{state.name}: exited: {reason}", printed=not seen_by_all_ranks)
        elif record["problem"]:
            self._abort(f"{state.name}: {record['problem']}")
        elif silent >= self._timing.timeout:
            self._abort(f"{state.name}: {self._no_heartbeat()}")
        elif state.missed == _LATE_BEATS and probes:
            try:
                socket.create_connection(record["address"], _PROBE_TIMEOUT).close()
            except ConnectionRefusedError:
                self._abort(f"{state.name}: {_CONNECTION_LOST}")
            except OSError:
                return False
        return probes

    def _abort(self, message: str, *, printed: bool = False) -> NoReturn:
        """Print `message` unless the failed rank has `printed` it, publish it, and end this process."""
        # First of all: a launcher may end this process as soon as another one has exited.
        if not printed:
            self._print(message)
        self._failure = message, False
        self._ended.set()
        self._post()
        # Other ranks read it with their next heartbeat.
        time.sleep(2 * self._timing.interval)
        os._exit(1)


class HeartbeatClient(FailureDetector):
    """The failure detector of another rank, which exits if rank 0 publishes a failure or fails itself."""

    def __init__(
        self, store: TCPStore, connection: socket.socket, rank: int, timing: HeartbeatTiming, *, reports: bool
    ) -> None:
        """Start; the idle `connection` closes when rank 0 ends; `reports`: this rank prints its failures."""
        self._connection, self._reports = connection, reports
        self._root: dict[str, Any] = {"name": "rank 0", "beat": 0}
        self._missed, self._exiting = 0, threading.Lock()
        # While rank 0 is frozen, calls of the store block without a limit: another thread checks rank 0.
        self._root_watch = threading.Thread(target=self._watch_root, name="heartbeat of rank 0", daemon=True)
        # It accepts nothing.
        self._listener = socket.create_server((connection.getsockname()[0], 0), family=connection.family)
        self._address = self._listener.getsockname()[:2]
        super().__init__(store, rank, timing)
        self._root_watch.start()

    def wait_for_root_exit(self) -> None:
        """After `report_failure`, wait until the process of rank 0 has ended."""
        self._root_watch.join(_ROOT_EXIT_TIMEOUT)

    def _check(self) -> None:
        root = json.loads(self._store.get("heartbeat/0"))
        if root["beat"] != self._root["beat"]:
            self._root, self._missed = root, 0
        if root["failure"]:
            reason, seen_by_all_ranks = root["failure"]
            self._exit(f"exited: {reason}" if seen_by_all_ranks else None)

    def _watch_root(self) -> None:
        """End this process if rank 0 ends or freezes; return when rank 0 has ended after this rank has."""
        self._connection.settimeout(self._timing.interval)
        while True:
            try:
                self._connection.recv(1)
            except TimeoutError:
                self._missed += 1
                if self._missed * self._timing.interval >= self._timing.timeout:
                    self._exit(self._no_heartbeat())
                continue
            except OSError:
                pass
            self._root_runs = False
            return self._exit(_CONNECTION_LOST)

    def _exit(self, failure: str | None) -> None:
        """End this process for a `failure` of rank 0, None if rank 0 printed it, unless it ends by itself."""
        with self._exiting:
            if failure is None:
                self._ended.set()
                with contextlib.suppress(RuntimeError):  # Rank 0 may have exited without this answer.
                    self._post()
            elif self._ended.wait(_LATE_BEATS * self._timing.interval):
                return
            elif self._reports:
                self._print(f"{self._root['name']}: {failure}")
            else:
                # A launcher may end all ranks when the first one exits: let the one that reports print.
                time.sleep(self._timing.interval)
            os._exit(1)
