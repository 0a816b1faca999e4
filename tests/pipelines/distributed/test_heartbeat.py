"""A rank that fails in any way ends all others soon, with one message that names it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import pytest
from helpers import Ranks

from pipelines.distributed.heartbeat import HeartbeatClient, HeartbeatTiming
from pipelines.errors import ConfigError

_PROGRAM = """
import sys, time
import torch
from pipelines.distributed.session import RankError, exit_now
from pipelines.distributed.world import World
from pipelines.distributed.cli import report_errors
from pipelines.errors import UserError

world = World.detect()
with report_errors(world) as session:
    session.connect(torch.device("cpu"))
    print("connected", flush=True)
    if world.rank == 2:
        {body}
    session.sum(torch.zeros(1))
print("finished")
exit_now(0, world)
"""

FAST = {"HEARTBEAT_INTERVAL": "1", "HEARTBEAT_TIMEOUT": "4", "STALL_TIMEOUT": "2"}


def start(body: str = "time.sleep(60)", ranks: tuple[int, ...] = (0, 1, 2), **variables: str) -> Ranks:
    """Start `ranks` of three; rank 2 executes `body`, while the others wait for it in a collective."""
    return Ranks([sys.executable, "-c", _PROGRAM.format(body=body)], ranks, 3, **FAST | variables)


def test_killed_and_frozen_ranks_are_named() -> None:
    cases = [
        (victim, number, message)
        for victim in range(3)
        for number, message in (
            (signal.SIGKILL, "connection lost; the process probably crashed or was killed"),
            (signal.SIGSTOP, "no heartbeat for 4 s"),
        )
    ]
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(start()) for _ in cases]
        for job, (victim, number, _) in zip(jobs, cases, strict=True):
            job.wait_until_printed("connected")
            job.processes[victim].send_signal(number)
        for job, (victim, number, message) in zip(jobs, cases, strict=True):
            statuses, words = job.end(30, victim)
            assert statuses == {1}
            name = f"rank {victim} (process {job.processes[victim].pid} on {socket.gethostname()})"
            assert words.count("error: ") == 1 and f"{name}: {message}" in words, (victim, number, words)
            # No C++ warnings with stack traces around it.
            assert len(words.splitlines()) == 2 + 1, words
            # A frozen rank that wakes up exits, too.
            job.processes[victim].send_signal(signal.SIGCONT)
        for job in jobs:
            assert job.end(30)[0] <= {1, -signal.SIGKILL}


def test_ranks_that_do_not_connect_are_named() -> None:
    with (
        start(ranks=(0, 1), RENDEZVOUS_TIMEOUT="4") as without_2,
        start(ranks=(1, 2), RENDEZVOUS_TIMEOUT="4") as without_0,
        start(ranks=(0, 1)) as twice,
        start(ranks=(1,), MASTER_PORT=str(twice.port)) as double,
        start(ranks=(0, 1)) as dying,
    ):
        time.sleep(2)
        dying.processes[1].kill()
        statuses, words = without_2.end(30)
        assert statuses == {1} and words.count("error: ") == 1
        assert "1 of 3 ranks did not connect (2), and none in the last 4 s" in words
        statuses, words = without_0.end(30)
        assert statuses == {1}
        ports = f"{without_0.port}-{min(without_0.port + 7, 65535)}"
        assert f"rank 1 of 3: cannot reach rank 0 at 127.0.0.1, port {ports}, within 4 s" in words
        statuses, words = twice.end(30)
        assert (
            statuses == {1} and words.count("error: ") == 1 and "has the same rank; all ranks exit" in words
        )
        for job in (twice, double):
            assert f"rank 1 (process {job.processes[1].pid}" in words
        assert double.end(20)[0] == {1}
        statuses, words = dying.end(30, 1)
        assert statuses == {1} and f"rank 1 (process {dying.processes[1].pid} on " in words


def test_reported_failures_end_all_ranks_with_one_message() -> None:
    known = "pass\n    session.run_on_root(lambda: (_ for _ in ()).throw(UserError('no data')))"
    cases = {
        'raise RankError(world, UserError("disk full"))': r"error: rank 2 of 3: disk full\n",
        'raise UserError("only here")': r"error: rank 2 \(process \d+ on \S+\): exited: only here; all ranks",
        'raise ValueError("mistake")': r"Traceback [^$]*ValueError: mistake\nerror: rank 2 of 3: mistake\n",
        'raise OSError(5, "no disk", "/data")': r"error: rank 2 of 3: /data: no disk\n",
        'with session.stall_guard("reading"): time.sleep(60)': (
            r"error: rank 2 \(process \d+ on \S+\): stuck for [2-9] s in reading \(does a file system hang"
        ),
        known: r"error: no data\n",
    }
    with contextlib.ExitStack() as stack:
        jobs = {body: stack.enter_context(start(body)) for body in cases}
        for body, message in cases.items():
            statuses, words = jobs[body].end(30)
            assert statuses == {1}, body
            assert words.count("error: ") == 1 and re.search(message, words), words


def test_ranks_that_finish_at_different_times_finish_in_peace() -> None:
    with start("time.sleep(5)") as job, start("pass", HEARTBEAT_INTERVAL="4") as fast:
        for ranks in (job, fast):
            statuses, words = ranks.end(40)
            assert statuses == {0} and words.count("finished") == 3 and "error" not in words


def test_other_connections_to_the_port_change_nothing() -> None:
    with start("pass", ranks=(0, 1)) as job:
        strangers = []
        for content in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x00\x00\x00\x02{}",
            b"",
            b"\x00\x00\x00",
            b"\x00\x00\xf0\x00" + b"[" * 0xF000,
        ):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with contextlib.suppress(ConnectionRefusedError):
                    strangers.append(socket.create_connection(("127.0.0.1", job.port), timeout=5))
                    break
                time.sleep(0.05)
            with contextlib.suppress(OSError):
                strangers[-1].sendall(content)
        with start("pass", ranks=(2,), MASTER_PORT=str(job.port)) as last:
            assert job.end(60)[0] == last.end(10)[0] == {0}
        for stranger in strangers:
            stranger.close()


def test_rank_exits_if_rank_0_is_gone_before_it_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    exited = threading.Event()

    class Store:
        gone = False

        def get(self, key: str) -> str:
            self.gone = True
            return json.dumps({"name": "rank 0", "beat": 1, "failure": ["disk full", False]})

        def compare_set(self, key: str, expected: str, desired: str) -> bytes:
            if self.gone:
                raise RuntimeError("connection reset")
            return desired.encode()

    def exit_thread(status: int) -> NoReturn:
        exited.set()
        raise RuntimeError  # Ends the thread.

    monkeypatch.setattr(os, "_exit", exit_thread)
    store: Any = Store()
    with socket.create_server(("127.0.0.1", 0)) as server:
        own, (other, _) = socket.create_connection(server.getsockname()), server.accept()
    with own, other:
        client = HeartbeatClient(store, own, 1, HeartbeatTiming(1, 40, 300), reports=False)
        assert exited.wait(10)
        other.close()
        client.wait_for_root_exit()
        client._listener.close()


def test_heartbeat_settings_are_read_from_the_environment() -> None:
    assert HeartbeatTiming.read({}, 8) == (2, 40, 300)
    # So that thousands of ranks do not load rank 0.
    assert [HeartbeatTiming.read({}, size).interval for size in (3072, 4096, 65536)] == [3, 4, 5]
    set_ = {"HEARTBEAT_INTERVAL": "7", "HEARTBEAT_TIMEOUT": "90", "STALL_TIMEOUT": "600"}
    assert HeartbeatTiming.read(set_, 4096) == (7, 90, 600)
    for name, value in (("HEARTBEAT_INTERVAL", "0"), ("HEARTBEAT_TIMEOUT", "long")):
        with pytest.raises(ConfigError) as refused:
            HeartbeatTiming.read({name: value}, 8)
        assert (refused.value.key, refused.value.value) == (name, value)
