"""Ranks of a training run that are killed or frozen at random moments under real launchers."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import Ranks, command, config_file, program, run, started_by, wait_until_gone, write_tiny
from run_artifacts import metrics


def process_of_rank(pid: int, rank: int) -> int:
    """Return the process of `rank` among those that the mpirun `pid` has started."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in started_by(pid):
            with contextlib.suppress(OSError):
                if f"OMPI_COMM_WORLD_RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                    return child
    raise TimeoutError(f"mpirun has started no rank {rank}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launcher", ["mpirun", "plain"])
def test_rank_killed_or_frozen_at_a_random_moment(launcher: str, tmp_path: Path) -> None:
    """All others exit within 60 seconds and name the rank, and the run resumes exactly."""
    rng = random.Random(launcher)
    data = write_tiny(tmp_path / "data", train=12, validation=4)
    changes = {"loader": {"batch_size": 1}, "log": {"every": 1, "checkpoint_every": 2}}
    config = config_file(tmp_path / "config.yaml", data, epochs=300, **changes)
    train = ["--config", config, "--run-dir"]
    undisturbed = tmp_path / "undisturbed"
    assert program("cosmoflow_dali.train", *train, undisturbed, ranks=3).code == 0
    for number, sent in enumerate((signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL)):
        victim, after = rng.randrange(3), rng.uniform(0.5, 8.0)
        run_dir = tmp_path / f"run{number}"
        mpi = launcher == "mpirun"
        line = command("cosmoflow_dali.train", [*train, run_dir], ranks=3 if mpi else 1)
        with Ranks(line, range(1 if mpi else 3), 1 if mpi else 3) as ranks:
            time.sleep(after)
            started = [process.pid for process in ranks.processes.values()]
            pid = process_of_rank(started[0], victim) if mpi else started[victim]
            everyone = [one for process in started for one in (process, *started_by(process))]
            assert [process.poll() for process in ranks.processes.values()] == [None] * len(started)
            os.kill(pid, sent)
            statuses, words = ranks.end(60, *(() if mpi else (victim,)))
            # mpirun, which sees that a rank was killed, names it too, and may end the others before they do.
            named = rf"rank {victim} (\(process|with PID) {pid} |ranks did not connect \({victim}\)"
            named += "|cannot reach rank 0" * (victim == 0)
            assert 0 not in statuses and re.search(named, words), (victim, sent, after, words)
            if not mpi:
                ranks.processes[victim].send_signal(signal.SIGCONT)
                ranks.end(60)
            wait_until_gone(everyone, 10)
        done = program("cosmoflow_dali.train", *train, run_dir, "--resume", ranks=3)
        assert done.code == 0 and metrics(run_dir) == metrics(undisturbed), (victim, sent, after, done.err)


@pytest.mark.slow
def test_run_restarted_by_torchrun_resumes_exactly(tmp_path: Path) -> None:
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
    assert f"resuming {folder} after " in words and metrics(folder) == metrics(whole)
