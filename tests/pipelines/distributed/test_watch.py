"""When a rank goes, the others leave soon and say which one, whatever it was and whatever they wait for."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import Ranks, config_file, mpirun, program, run, started_by, wait_until_gone, write_tiny
from left_behind import metrics

_WAIT = """
import sys, time
import torch
from pipelines.distributed import watch
from pipelines.distributed.session import RankError, exit_now
from pipelines.distributed.world import World
from pipelines.distributed.cli import report_errors
from pipelines.errors import UserError

watch.SILENCE, watch.STALL = 6.0, 3.0
world = World.detect()
with report_errors(world) as session:
    session.connect(torch.device("cpu"))
    print("met", flush=True)
    if world.rank == 2:
        {body}
    for _ in range({sums}):
        session.sum(torch.zeros(1))
print("whole")
exit_now(0, world)
"""


def waiting(body: str = "time.sleep(60)", sums: int = 1) -> list[str]:
    """A program whose rank 2 does `body`, while the others wait for it in a collective."""
    return [sys.executable, "-c", _WAIT.format(body=body, sums=sums)]


def wait_until_met(ranks: Ranks) -> None:
    ranks.wait_until_printed("met")


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "has died without a word"), (signal.SIGSTOP, "has said nothing for 6 s")],
)
def test_a_rank_that_goes_is_missed_by_name(victim: int, number: signal.Signals, said: str) -> None:
    with Ranks(waiting(), range(3), 3) as ranks:
        wait_until_met(ranks)
        ranks.processes[victim].send_signal(number)
        statuses, words = ranks.end(20, victim)
        assert statuses == {1}
        pid = ranks.processes[victim].pid
        assert words.count("error: ") == 1 and f"rank {victim} (process {pid} on " in words and said in words
        # One that wakes up again finds that all others have gone.
        ranks.processes[victim].send_signal(signal.SIGCONT)
        assert ranks.end(20)[0] <= {1, -signal.SIGKILL}


def test_a_rank_that_does_not_come_is_missed_by_number() -> None:
    with Ranks(waiting(), [0, 1], 3, RENDEZVOUS_TIMEOUT="8") as ranks:
        statuses, words = ranks.end(40)
    assert statuses == {1} and words.count("error: ") == 1
    assert "1 of 3 ranks have not come (2), and none in the last 8 s" in words


def test_a_rank_0_that_does_not_come_is_missed() -> None:
    with Ranks(waiting(), [1, 2], 3, RENDEZVOUS_TIMEOUT="4") as ranks:
        statuses, words = ranks.end(40)
        assert statuses == {1}
        assert f"rank 1 of 3: rank 0 has not been at 127.0.0.1, port {ranks.port}, in 4 s" in words


def test_two_that_say_they_are_the_same_rank_are_named() -> None:
    line = waiting()
    with Ranks(line, [0, 1], 3) as ranks, Ranks(line, [1], 3, MASTER_PORT=str(ranks.port)) as double:
        statuses, words = ranks.end(40)
        assert statuses == {1} and "both say that they are rank 1" in words
        assert double.end(20)[0] == {1}


def test_a_rank_that_is_stuck_is_told_of() -> None:
    with Ranks(waiting('with session.stall_guard("reading"): time.sleep(60)'), range(3), 3) as ranks:
        statuses, words = ranks.end(40)
        assert statuses == {1} and words.count("error: ") == 1
        assert f"rank 2 (process {ranks.processes[2].pid}" in words
        assert re.search(r"has been reading for [3-9] s \(does a file system hang\?\)", words)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('raise RankError(world, UserError("the disk is on fire"))', "rank 2 of 3: the disk is on fire"),
        ('raise UserError("only I know")', "has left: only I know"),
        ('raise ValueError("a mistake")', "rank 2 of 3: a mistake"),
    ],
)
def test_a_rank_that_fails_takes_the_others_along(body: str, said: str) -> None:
    with Ranks(waiting(body), range(3), 3) as ranks:
        statuses, words = ranks.end(40)
    assert statuses == {1}
    assert words.count("error: ") == 1 and words.count(said) == 1
    assert ("Traceback" in words) == ("ValueError" in body)


def test_what_all_ranks_know_is_said_once() -> None:
    known = "pass\n    def refuse():\n        raise UserError('no data')\n    session.run_on_root(refuse)"
    with Ranks(waiting(known), range(3), 3) as ranks:
        statuses, words = ranks.end(40)
    assert statuses == {1} and words.count("error: no data") == words.count("error: ") == 1


def test_strangers_at_the_door_change_nothing() -> None:
    with Ranks(waiting("pass", sums=3), [0, 1], 3) as ranks:
        strangers = []
        nested = b"\x00\x00\xf0\x00" + b"[" * 0xF000
        said = (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x00\x00\x00\x02{}",
            b"\x00\x00\x00\x04nil!",
            b"",
            b"\x00\x00\x00",
            nested,
        )
        for words in said:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    strangers.append(socket.create_connection(("127.0.0.1", ranks.port), timeout=5))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
            strangers[-1].sendall(words)
        with Ranks(waiting("pass", sums=3), [2], 3, MASTER_PORT=str(ranks.port)) as last:
            assert ranks.end(60)[0] == last.end(10)[0] == {0}
        for stranger in strangers:
            stranger.close()


def test_ranks_that_part_at_different_times_part_in_peace() -> None:
    for body in ("time.sleep(4)", "pass"):
        with Ranks(waiting(body, sums=1), range(3), 3) as ranks:
            statuses, words = ranks.end(40)
        assert statuses == {0} and words.count("whole") == 3


def rank_of_mpirun(pid: int, rank: int) -> int:
    """The process of `rank` among those that the mpirun `pid` has started, once it is there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in started_by(pid):
            with contextlib.suppress(OSError):
                if f"OMPI_COMM_WORLD_RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                    return child
    raise TimeoutError(f"mpirun has started no rank {rank}")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("launcher", ["mpirun", "plain"])
def test_a_rank_killed_or_frozen_at_a_random_moment(launcher: str, tmp_path: Path) -> None:
    """Ten runs a launcher: the others are gone within 60 seconds, nothing is left, and a resume is exact."""
    rng = random.Random(launcher)
    data = write_tiny(tmp_path / "data", train=12, validation=4)
    changes = {"loader": {"batch_size": 1}, "log": {"every": 1, "checkpoint_every": 2}}
    config = config_file(tmp_path / "config.yaml", data, epochs=150, **changes)
    whole = tmp_path / "whole"
    assert program("cosmoflow_dali.train", "--config", config, "--run-dir", whole, ranks=3).code == 0
    failures: list[str] = []

    def one(number: int, victim: int, sent: signal.Signals, after: float) -> None:
        folder = tmp_path / f"run{number}"
        line = [
            sys.executable,
            "-m",
            "cosmoflow_dali.train",
            "--config",
            str(config),
            "--run-dir",
            str(folder),
        ]
        ranks = Ranks([*mpirun(3), *line], [0], 1) if launcher == "mpirun" else Ranks(line, range(3), 3)
        with ranks:
            time.sleep(after)
            if launcher == "mpirun":
                pid = rank_of_mpirun(ranks.processes[0].pid, victim)
            else:
                pid = ranks.processes[victim].pid
            everyone = [
                one for process in ranks.processes.values() for one in (process.pid, *started_by(process.pid))
            ]
            ended = [process.poll() for process in ranks.processes.values()]
            if ended != [None] * len(ended):
                failures.append(f"{number}: ended before it was {sent.name}: {ended}")
                return
            run(["kill", f"-{sent.name[3:]}", str(pid)])
            but = () if launcher == "mpirun" else (victim,)
            try:
                statuses, words = ranks.end(60, *but)
            except Exception as error:  # told of below, with the others
                failures.append(f"{number}: rank {victim} {sent.name} after {after:.1f} s: {error}")
                return
            # mpirun, which sees a rank killed, names it too, and may end the others before they do.
            named = rf"rank {victim} (\(process|with PID) {pid} |ranks have not come \({victim}\)"
            named += "|rank 0 has not been at" * (victim == 0)
            if 0 in statuses or not re.search(named, words):
                failures.append(
                    f"{number}: rank {victim} {sent.name} after {after:.1f} s: {statuses}: {words}"
                )
            if launcher == "plain":
                ranks.processes[victim].send_signal(signal.SIGCONT)
                ranks.end(60)
            try:
                wait_until_gone(everyone, 10)
            except TimeoutError as error:
                failures.append(f"{number}: {error}")
        done = program("cosmoflow_dali.train", "--config", config, "--run-dir", folder, "--resume", ranks=3)
        if done.code != 0 or metrics(folder) != metrics(whole):
            failures.append(f"{number}: the resumed run differs: {done.err}")

    cases = [
        (number, rng.randrange(3), (signal.SIGKILL, signal.SIGSTOP)[number % 2], rng.uniform(0.5, 20.0))
        for number in range(10)
    ]
    for first in range(0, 10, 2):
        both = [threading.Thread(target=one, args=case) for case in cases[first : first + 2]]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_torchrun_starts_a_run_again_that_goes_on_exactly(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=12, validation=4)
    changes = {"loader": {"batch_size": 1}, "log": {"every": 1, "checkpoint_every": 2}}
    config = config_file(tmp_path / "config.yaml", data, epochs=60, **changes)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    train = ["-m", "cosmoflow_dali.train", "--config", str(config), "--run-dir"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = run([*line, *train, str(whole)])
    assert done.code == 0, done.err
    with Ranks([*line, "--max-restarts", "1", *train, str(folder), "--resume"], [0], 1) as agent:
        deadline = time.monotonic() + 120
        while not any((folder / "checkpoints").glob("epoch00005_*.pt")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run(["kill", "-KILL", str(started_by(agent.processes[0].pid)[1])])
        statuses, words = agent.end(200)
    assert statuses == {0}, words
    assert "going on with" in words and metrics(folder) == metrics(whole)
