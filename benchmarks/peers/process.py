"""The process of one row: writes its files, checks its values, or measures it.

    python -m benchmarks.peers.process TASK RESULT

TASK is a `Task` in JSON; figures are written to the file RESULT.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import harness
from benchmarks.peers.contract import AHEAD, WORKERS, Item, Job
from benchmarks.peers.registry import PEERS
from cosmoflow_dali.compute.torch_setup import tune_malloc
from pipelines.dataset.open import open_folder
from pipelines.loading.transforms import lookup_table

LEAD = 2 * AHEAD * WORKERS
"""Batches before the timed ones: more than any row holds ready."""

_ENDLESS = 1000
"""Epochs of a row that is read from the page cache."""

_LIMIT_S = 300.0
"""Seconds after which a process is stopped."""

Action = Literal["write", "check", "cache", "disk"]


@dataclass(frozen=True, slots=True)
class Task:
    """Work of a process.

    Attributes:
        action: "write" the files, "check" the values, or measure reads from the "cache" or the "disk", the
            latter in one pass over the samples.
        peer: Name of the row.
        source: Folder of the distinct samples.
        folder: Files of the row.
        samples: Samples in them: the distinct ones, repeated.
        size: Edge in voxels.
        steps: Timed batches.
    """

    action: Action
    peer: str
    source: str
    folder: str
    samples: int
    size: int
    steps: int

    def job(self, epochs: int) -> Job:
        """Return the samples to deliver."""
        return Job(Path(self.folder), self.size, self.samples, epochs)


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a row in one round.

    Attributes:
        samples_per_s: Per second of wall time.
        cpu_ms: CPU time per sample, of all processes.
        first_ms: From the call that opens the files to the first batch.
        peak_mb: Largest memory of all processes, after a batch: anonymous and shared, without mapped files.
    """

    samples_per_s: float
    cpu_ms: float
    first_ms: float
    peak_mb: float


class RowError(Exception):
    """The process of a row failed; the text is the last line of its errors."""


def run_task(task: Task, enter: Callable[[], None] | None = None) -> str:
    """Run the process of `task`, which calls `enter` first; return its figures in JSON, if it measures any.

    Raises:
        RowError: It failed, or did not end in time.
    """
    return run_module("benchmarks.peers.process", task.action, json.dumps(asdict(task)), enter=enter)


def run_module(
    module: str,
    action: str,
    task: str,
    *,
    environment: Mapping[str, str] | None = None,
    enter: Callable[[], None] | None = None,
) -> str:
    """Run `python -m MODULE TASK RESULT`; return what it wrote to the file RESULT, if anything.

    Args:
        action: Name of the task in errors.
        environment: Additional environment variables.
        enter: Is called by the process first.

    Raises:
        RowError: It failed, or did not end in time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, task, str(result)],
                cwd=Path(__file__).resolve().parents[2],
                env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_LIMIT_S,
                text=True,
                errors="replace",
                preexec_fn=enter,
            )
        except subprocess.TimeoutExpired:
            raise RowError(f"{action}: not finished after {_LIMIT_S:g} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RowError(f"{action}: {lines[-1]}")
        return result.read_text() if result.exists() else ""


def write(task: Task) -> None:
    """Write the samples in the form of the row."""
    split = open_folder(Path(task.source))
    distinct = [split.read(index) for index in range(len(split))]
    PEERS[task.peer].write(Path(task.folder), [distinct[i % len(distinct)] for i in range(task.samples)])


def check(task: Task) -> None:
    """Compare the batches of an epoch with the source.

    Raises:
        ValueError: A sample is missing or repeated, or a value differs.
    """
    split, table = open_folder(Path(task.source)), lookup_table(apply_log=True)
    samples = [split.read(index) for index in range(len(split))]
    known = {sample.target.tobytes(): index for index, sample in enumerate(samples)}
    expected = [table[sample.counts] for sample in samples]
    seen: Counter[int] = Counter()
    items = PEERS[task.peer].open(task.job(1))
    for _, (volume, target) in zip(range(task.samples), items, strict=False):
        index = known[np.asarray(target, np.float32).tobytes()]
        values = volume[0].permute(1, 2, 3, 0).numpy()
        # Libraries round a logarithm in single precision differently.
        if values.shape != expected[index].shape or not (
            np.array_equal(values, expected[index]) or np.allclose(values, expected[index], 3e-7, 0)
        ):
            raise ValueError(f"the values of sample {index} differ")
        seen[index] += 1
    if seen != Counter(index % len(split) for index in range(task.samples)):
        raise ValueError(f"the samples of an epoch are {sorted(seen.elements())}")


def measure(task: Task) -> Figures:
    """Measure the row."""
    peer, cached = PEERS[task.peer], task.action == "cache"
    started = time.perf_counter()
    batches = _count(peer.open(task.job(_ENDLESS if cached else 1)))
    next(batches)
    first = time.perf_counter() - started
    reading = _measure_cache(batches, task.steps) if cached else _measure_disk(batches, task.steps)
    peak = max(_memory() for _ in range(AHEAD) if next(batches))
    return Figures(1 / reading.wall, 1e3 * reading.cpu, 1e3 * first, peak / 1e6)


def _measure_cache(batches: Iterator[int], steps: int) -> harness.Reading:
    (reading,) = harness.measure({"": batches}, rounds=1, lead=LEAD, steps=steps)[""]
    return reading


def _measure_disk(batches: Iterator[int], steps: int) -> harness.Reading:
    """Time `steps` batches of the only pass; rows work ahead as much at the end as at the start."""
    for _ in range(LEAD):
        next(batches)
    wall, cpu = time.perf_counter(), harness.cpu_seconds()
    for _ in range(steps):
        next(batches)
    return harness.Reading((time.perf_counter() - wall) / steps, (harness.cpu_seconds() - cpu) / steps)


def _count(items: Iterator[Item]) -> Iterator[int]:
    for volume, _ in items:
        assert volume[0, 0, 0, 0, 0].item() >= 0.0
        yield 1


def _memory() -> int:
    """Return the bytes of memory of this process and its descendants, what they share once."""
    total = 0
    for pid in (os.getpid(), *harness.descendants(os.getpid())):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += 1024 * int(line.split()[1])
    return total


def main() -> None:
    """Run the command line."""
    task, result = Task(**json.loads(sys.argv[1])), Path(sys.argv[2])
    peer = PEERS[task.peer]
    if not peer.plain:
        tune_malloc()
    for module in peer.modules:
        importlib.import_module(module)
    if task.action == "write":
        write(task)
    elif task.action == "check":
        check(task)
    else:
        result.write_text(json.dumps(asdict(measure(task))))
    # Threads and workers of some libraries do not end by themselves.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
