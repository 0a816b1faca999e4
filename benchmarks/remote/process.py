"""The process of one task of a remote loader: writes files, checks values, takes a state, resumes, measures.

    python -m benchmarks.remote.process TASK RESULT

TASK is a `Task` in JSON; what it returns is written to the file RESULT in JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import pickle
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import harness
from benchmarks.object_store import HOST, client_environment
from benchmarks.peers.process import run_module
from benchmarks.remote.loaders import CLIENTS, REMOTES, Batches, RemoteJob
from benchmarks.remote.proxy import read_counts
from cosmoflow_dali.compute.torch_setup import tune_malloc
from pipelines.dataset.open import open_folder
from pipelines.loading.transforms import lookup_table
from pipelines.sample import Sample

EPOCHS = 2
"""Measured epochs; the second one shows what the loader has kept."""

NUMBERS = 1024
"""Limit of samples, which their targets number."""

Action = Literal["write", "check", "stop", "resume", "measure"]


@dataclass(frozen=True, slots=True)
class Task:
    """Work of a process.

    Attributes:
        action: "write" the files; "check" the values of an epoch and return its order; "stop" after `steps`
            batches and keep the state; "resume" there and return the order of the rest; or "measure".
        row: Name of the row.
        source: Folder of the distinct samples.
        folder: Folder to write, or the loader's cache.
        samples: Samples of an epoch: the distinct ones, repeated, each with a number in its target.
        url, http, size, batch, rank, ranks: See `RemoteJob`.
        meeting: Port where ranks meet.
        state: File of the state.
        counts: File of the proxy's counts.
        servers: Processes of the server and of the proxy.
    """

    action: Action
    row: str
    source: str
    folder: str
    samples: int
    size: int
    url: str = ""
    http: str = ""
    batch: int = 1
    steps: int = 0
    rank: int = 0
    ranks: int = 1
    meeting: int = 0
    state: str = ""
    counts: str = ""
    servers: tuple[int, ...] = ()

    def open(self) -> Batches:
        """Open the loader."""
        state = pickle.loads(Path(self.state).read_bytes()) if self.action == "resume" else None
        job = RemoteJob(
            self.url, self.http, Path(self.folder), self.size, self.batch, self.rank, self.ranks, state
        )
        return REMOTES[self.row].open(job)


@dataclass(frozen=True, slots=True)
class EpochFigures:
    """Figures of one epoch.

    Attributes:
        samples_per_s: Per second of wall time, the first epoch from the call that opens the loader.
        cpu_ms: CPU time per sample of the loader's processes.
        server_ms: That of the server and the proxy.
        requests, mb: Requests, and MB of answers, per sample.
    """

    samples_per_s: float
    cpu_ms: float
    server_ms: float
    requests: float
    mb: float


def run_task(task: Task, port: int) -> Any:
    """Run the process of `task` with the server at `port`; return its result.

    Raises:
        RowError: It failed, or did not end in time.
    """
    environment = client_environment(port)
    if task.ranks > 1:
        # LitData calls RANK GLOBAL_RANK.
        ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "GLOBAL_RANK"), task.rank)
        ranks |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), task.ranks)
        ranks["MASTER_PORT"] = task.meeting
        environment |= {"MASTER_ADDR": HOST, **{name: str(value) for name, value in ranks.items()}}
    text = json.dumps(asdict(task))
    result = run_module("benchmarks.remote.process", task.action, text, environment=environment)
    return json.loads(result or "null")


def numbered(samples: list[Sample], count: int) -> list[Sample]:
    """Return `count` samples: those of `samples`, repeated, with targets that `number_of` reads."""
    return [
        Sample(sample.counts, np.array([index / NUMBERS, *sample.target[1:]], np.float32))
        for index, sample in zip(range(count), itertools.cycle(samples), strict=False)
    ]


def number_of(target: Any) -> int:
    """Return the number of a sample by its target."""
    return round(NUMBERS * float(np.asarray(target).reshape(-1)[0]))


def write(task: Task) -> None:
    """Write the files of the row."""
    split = open_folder(Path(task.source))
    distinct = [split.read(index) for index in range(len(split))]
    REMOTES[task.row].write(Path(task.folder), numbered(distinct, task.samples))


def check(task: Task) -> tuple[list[list[int]], bool]:
    """Return the numbers of the samples of each batch, and whether all values are this project's bit by bit.

    Raises:
        ValueError: A sample is missing or repeated, or a value differs by more than rounding.
    """
    split, table = open_folder(Path(task.source)), lookup_table(apply_log=True)
    expected = [table[split.read(index).counts] for index in range(len(split))]
    order, same_bits = [], True
    for batch in task.open().epoch():
        order.append([number_of(target) for _, target in batch])
        for (volume, _), number in zip(batch, order[-1], strict=True):
            values, wanted = volume[0].permute(1, 2, 3, 0).numpy(), expected[number % len(split)]
            if not np.array_equal(values, wanted):
                same_bits = False
                # Libraries round a logarithm in single precision differently.
                if values.shape != wanted.shape or not np.allclose(values, wanted, 3e-7, 0):
                    raise ValueError(f"the values of sample {number} differ")
    if sorted(itertools.chain(*order)) != list(range(task.samples)):
        raise ValueError(f"the samples of an epoch are {sorted(itertools.chain(*order))}")
    return order, same_bits


def stop(task: Task) -> bool:
    """Take `steps` batches and keep the state; return whether the loader has one."""
    loader = task.open()
    if loader.state is None:
        return False
    batches = loader.epoch()
    for _ in range(task.steps):
        next(batches)
    Path(task.state).write_bytes(pickle.dumps(loader.state()))
    return True


def resume(task: Task) -> list[list[int]]:
    """Return the numbers of the samples of each batch that is left of the epoch."""
    return [[number_of(target) for _, target in batch] for batch in task.open().epoch()]


def measure(task: Task) -> tuple[float, list[EpochFigures]]:
    """Return the milliseconds from opening the loader to the first batch, and the figures of each epoch."""

    def now() -> tuple[float, ...]:
        servers = sum(harness.cpu_seconds_of(pid) for pid in task.servers)
        return time.perf_counter(), harness.cpu_seconds(), servers, *read_counts(Path(task.counts))

    figures, first = [], 0.0
    before = started = now()
    loader = task.open()
    for _ in range(EPOCHS):
        samples = 0
        for batch in loader.epoch():
            first = first or time.perf_counter() - started[0]
            samples += len([volume for volume, _ in batch if volume[0, 0, 0, 0, 0].item() >= 0.0])
        after = now()
        wall, cpu, servers, requests, length = ((b - a) / samples for a, b in zip(before, after, strict=True))
        figures.append(EpochFigures(1 / wall, 1e3 * cpu, 1e3 * servers, requests, length / 1e6))
        before = after
    return 1e3 * first, figures


def main() -> None:
    """Run the command line."""
    task, result = Task(**json.loads(sys.argv[1])), Path(sys.argv[2])
    tune_malloc()
    for module in (*REMOTES[task.row].peer.modules, *CLIENTS):
        importlib.import_module(module)
    actions = {"write": write, "check": check, "stop": stop, "resume": resume, "measure": measure}
    result.write_text(json.dumps(actions[task.action](task), default=asdict))
    # Threads and workers of some libraries do not end by themselves, or only after seconds.
    for pid in harness.descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
