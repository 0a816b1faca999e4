"""Shared parts of the benchmarks: fair rounds, CPU and wall time, and records of results.

Machines are noisy, so candidates take turns within one process and are compared by ratios within the same
round; the spread of a ratio over the rounds shows its uncertainty. Candidates work ahead in threads and
processes, so a turn begins and ends with all of them idle: none pays for the work of another, and none is
timed on batches that were ready before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cosmoflow_dali.reporting import system_info
from pipelines.errors import writing

RESULTS = Path(__file__).resolve().parent / "results"
_POLL, _POLLS, _IDLE = 0.03, 4, 0.1
"""Idle: less than a tenth of a core in four consecutive polls, 30 ms apart."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A candidate's turn in one round.

    Attributes:
        wall: Seconds of wall time per sample.
        cpu: Seconds of CPU time per sample.
        waits: Seconds for each timed batch.
    """

    wall: float
    cpu: float
    waits: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Spread:
    """10th percentile, median and 90th percentile over the rounds."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the percentiles of `values`."""
        return cls(*np.percentile(list(values), (10, 50, 90)).tolist())

    def text(self, digits: int) -> str:
        """Return the median with the 10th and 90th percentiles in parentheses."""
        return f"{self.median:.{digits}f} ({self.p10:.{digits}f}-{self.p90:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a candidate over all rounds.

    Attributes:
        samples_per_s, bytes_per_s: Per second of wall time.
        cpu_ms: CPU time per sample in ms, including workers.
        latency_ms: Time for a batch in ms over all rounds: 50th, 95th and 99th percentile.
    """

    samples_per_s: Spread
    bytes_per_s: Spread
    cpu_ms: Spread
    latency_ms: tuple[float, float, float]


def measure(
    candidates: Mapping[str, Iterator[int]], *, rounds: int, lead: int, steps: int
) -> dict[str, list[Reading]]:
    """Return the readings of each candidate in `rounds` rounds, after a warm-up round.

    CPU time is measured from idle to idle. It is that of the batches taken in the turn: as many batches are
    ready at its end as at its start.

    Args:
        candidates: Endless iterators; each item is the number of samples of a delivered batch.
        lead: Batches of a turn before the timed ones, at least as many as a candidate holds ready.
        steps: Timed batches of a turn.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in candidates}
    for warm in [False] + [True] * rounds:
        for name, batches in candidates.items():
            cpu = _cpu_when_idle()
            led = sum(next(batches) for _ in range(lead))
            times, timed = [time.perf_counter()], 0
            for _ in range(steps):
                timed += next(batches)
                times.append(time.perf_counter())
            cpu = _cpu_when_idle() - cpu
            if warm:
                wall, waits = times[-1] - times[0], tuple(np.diff(times).tolist())
                readings[name].append(Reading(wall / timed, cpu / (led + timed), waits))
    return readings


def cpu_seconds() -> float:
    """Return the CPU time of this process, of its ended children and of all running descendants."""
    ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(usage.ru_utime + usage.ru_stime for usage in ended)
    for pid in descendants(os.getpid()):
        # One that ended meanwhile is among the children, or lost.
        with contextlib.suppress(OSError):
            total += cpu_seconds_of(pid)
    return total


def cpu_seconds_of(pid: int) -> float:
    """Return the CPU time of process `pid` and of its ended children; OSError if it has ended."""
    # Of the ended children, in ticks: see proc_pid_stat(5).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ended = sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")
    # The clock of a process, as clock_getcpuclockid(3) makes it.
    return time.clock_gettime((~pid << 3) | 2) + ended


def descendants(pid: int) -> list[int]:
    """Return the processes that process `pid`, its children and so on have started and that still run."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def summarise(readings: Iterable[Reading], sample_bytes: int) -> Summary:
    """Return the figures of a candidate's rounds, with samples of `sample_bytes` bytes."""
    readings = list(readings)
    waits = [wait for reading in readings for wait in reading.waits]
    return Summary(
        samples_per_s=Spread.of(1.0 / reading.wall for reading in readings),
        bytes_per_s=Spread.of(sample_bytes / reading.wall for reading in readings),
        cpu_ms=Spread.of(1e3 * reading.cpu for reading in readings),
        latency_ms=tuple(1e3 * np.percentile(waits, (50, 95, 99))),
    )


def ratio(one: Iterable[Reading], other: Iterable[Reading], quantity: Literal["wall", "cpu"]) -> Spread:
    """Return the spread of `quantity` per sample of `one` relative to `other` in the same round."""
    pairs = zip(one, other, strict=True)
    return Spread.of(getattr(a, quantity) / getattr(b, quantity) for a, b in pairs)


def save(
    name: str,
    options: Mapping[str, Any],
    results: Mapping[str, Any],
    folder: Path = RESULTS,
    started: time.struct_time | None = None,
) -> Path:
    """Write `results` with options, versions and hardware to a dated JSON file; return its path.

    Dataclasses become objects. Options that are paths are omitted. The file that was `started` then is
    replaced, by default one that starts now.
    """
    started = started or time.localtime()
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z", started),
        "options": {key: value for key, value in options.items() if not isinstance(value, Path)},
        "versions": system_info.versions(),
        "hardware": system_info.hardware(),
        "results": results,
    }
    path = folder / f"{time.strftime('%Y-%m-%dT%H%M%S', started)}_{name}.json"
    # Not by pipelines.io, which needs packages that are missing on machines with torch alone.
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=2, default=asdict) + "\n")
        temporary.replace(path)
    return path


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the module's docstring as description and the option --output."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, nargs="?", const=RESULTS, help="write JSON (to benchmarks/results)"
    )
    return parser


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def numbers(text: str) -> list[int]:
    """Parse comma-separated whole numbers of at least 1."""
    return [positive(part) for part in text.split(",")]


def among(text: str, known: Iterable[str]) -> list[str]:
    """Parse comma-separated words, which must be in `known`."""
    parts = text.split(",")
    if unknown := set(parts) - set(known):
        raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {', '.join(known)}")
    return parts


def _cpu_when_idle() -> float:
    """Wait until all work ahead is done; return the CPU time used."""
    used, calm = cpu_seconds(), 0
    deadline = time.monotonic() + 60
    while calm < _POLLS:
        if time.monotonic() > deadline:
            raise RuntimeError("a candidate does not become idle within 60 s")
        time.sleep(_POLL)
        before, used = used, cpu_seconds()
        calm = calm + 1 if used - before < _IDLE * _POLL else 0
    return used
