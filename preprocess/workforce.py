"""Worker processes that make universes: started, fed, listened to, and ended in every case."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from pipelines.errors import DataError, UserError
from preprocess.universe import SimulateConfig, SplitName

Job = tuple[SplitName, int]

_CHECKOUT = Path(__file__).resolve().parents[1]


def _start(config: SimulateConfig, root: Path, lock: int) -> subprocess.Popen[str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, (str(_CHECKOUT), os.environ.get("PYTHONPATH"))))
    worker = subprocess.Popen(
        [sys.executable, "-m", "preprocess.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, "PYTHONPATH": path},
        # It holds the folder's lock as long as it lives, which can be a moment longer than we do.
        pass_fds=(lock,),
        # Ctrl-C is for the parent, which ends the workers.
        start_new_session=True,
    )
    _send(worker, {"config": asdict(config), "root": str(root)})
    return worker


def _send(worker: subprocess.Popen[str], message: object) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps(message) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # It is dead: the missing answer says so.


def make_universes(
    config: SimulateConfig, root: Path, jobs: Sequence[Job], workers: int, lock: int
) -> Generator[tuple[int, int]]:
    """Have `workers` processes make the universes of `jobs`; (files, bytes) as each is finished.

    Raises a UserError for what a worker says it cannot do, a DataError if one dies. No worker
    outlives the iterator.
    """
    waiting = iter(jobs)
    team: list[subprocess.Popen[str]] = []
    try:
        with selectors.DefaultSelector() as listening:
            for _, job in zip(range(workers), waiting, strict=False):
                team.append(_start(config, root, lock))
                _send(team[-1], job)
                assert team[-1].stdout is not None
                listening.register(team[-1].stdout, selectors.EVENT_READ, (team[-1], job))
            while listening.get_map():
                for key, _ in listening.select():
                    worker, job = key.data
                    stream: IO[str] = worker.stdout
                    yield _answer(stream.readline(), worker, root, job)
                    following = next(waiting, None)
                    if following is None:
                        listening.unregister(stream)
                    else:
                        listening.modify(stream, selectors.EVENT_READ, (worker, following))
                        _send(worker, following)
    finally:
        for worker in team:
            worker.kill()
        for worker in team:
            worker.communicate()


def _answer(line: str, worker: subprocess.Popen[str], root: Path, job: Job) -> tuple[int, int]:
    if not line:
        split, universe = job
        raise DataError(
            root,
            f"the process that simulated universe {universe} of {split} ended with {worker.wait()}",
            "see its last words above, or give it more memory; a rerun goes on from here",
        )
    answer = json.loads(line)
    if "error" in answer:
        raise UserError(f"{answer['error']}; mend that, and a rerun goes on from here")
    return answer["files"], answer["bytes"]
