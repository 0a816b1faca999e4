"""Worker processes that do the jobs of a task: started, fed, listened to, and ended in every case."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, Protocol

from pipelines.errors import UserError

_CHECKOUT = Path(__file__).resolve().parents[2]


class Task(Protocol):
    """What workers do: a frozen dataclass of plain values at the top of its module."""

    def __call__(self, job: Any) -> Any:
        """Do `job`; both it and the answer are what JSON can hold. UserError where it cannot."""


def run_jobs(
    task: Task, jobs: Iterable[Any], workers: int, pass_fds: Sequence[int] = ()
) -> Generator[tuple[Any, Any]]:
    """Have `workers` processes do `jobs`; (job, answer) as each is finished, in any order.

    Each worker has one thread of arithmetic, and holds `pass_fds` open as long as it lives, which can
    be a moment longer than the thread that has started it: with that the kernel ends it.

    Raises a UserError for what a worker says it cannot do, or if one dies. No worker outlives the
    iterator.
    """
    waiting = iter(jobs)
    team: list[subprocess.Popen[str]] = []
    try:
        with selectors.DefaultSelector() as listening:
            for _, job in zip(range(workers), waiting, strict=False):
                team.append(_start(task, pass_fds))
                _send(team[-1], job)
                assert team[-1].stdout is not None
                listening.register(team[-1].stdout, selectors.EVENT_READ, (team[-1], job))
            while listening.get_map():
                for key, _ in listening.select():
                    worker, job = key.data
                    stream: IO[str] = worker.stdout
                    yield job, _answer(stream.readline(), worker, job)
                    try:
                        following = next(waiting)
                    except StopIteration:
                        listening.unregister(stream)
                    else:
                        listening.modify(stream, selectors.EVENT_READ, (worker, following))
                        _send(worker, following)
    finally:
        for worker in team:
            worker.kill()
        for worker in team:
            worker.communicate()


def _start(task: Task, pass_fds: Sequence[int]) -> subprocess.Popen[str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, (str(_CHECKOUT), os.environ.get("PYTHONPATH"))))
    worker = subprocess.Popen(
        [sys.executable, "-m", "preprocess.conversion.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, "PYTHONPATH": path},
        pass_fds=pass_fds,
        # Ctrl-C is for the parent, which ends the workers.
        start_new_session=True,
    )
    kind = type(task)
    settings = asdict(task)  # type: ignore[call-overload]
    header = {"module": kind.__module__, "task": kind.__qualname__, "settings": settings}
    _send(worker, {**header, "parent": os.getpid()})
    return worker


def _send(worker: subprocess.Popen[str], message: object) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps(message) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # It is dead: the missing answer says so.


def _answer(line: str, worker: subprocess.Popen[str], job: Any) -> Any:
    if not line:
        raise UserError(
            f"the process that worked on {shorten(str(job), 200)} ended with {worker.wait()}; "
            "see its last words above, or give it more memory; a rerun goes on from here"
        )
    answer = json.loads(line)
    if "error" in answer:
        raise UserError(f"{answer['error']}; mend that, and a rerun goes on from here")
    return answer["made"]
