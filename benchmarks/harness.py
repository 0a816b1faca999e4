"""What every benchmark shares: fair turns, CPU beside wall time, and a record of what ran where.

Machines are noisy, so contestants take turns within one run and are compared by the ratios of the
same round; a ratio's spread over the rounds says what it is worth. Contestants work ahead in
threads and processes of their own, so a turn begins and ends with all of them at rest: nobody pays
for what another had begun, and nobody is timed on what lay ready.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cosmoflow_dali.reporting import system_info

RESULTS = Path(__file__).resolve().parent / "results"
_POLL, _POLLS, _IDLE = 0.03, 4, 0.1
"""At rest is to have used less than a tenth of a core in four polls running, 30 ms apart."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One contestant's turn in one round: seconds a sample on the clock and on all processors.

    waits: seconds for each batch that was timed.
    """

    wall: float
    cpu: float
    waits: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles over the rounds: the 10th, the median and the 90th."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The percentiles of `values`."""
        return cls(*np.percentile(list(values), (10, 50, 90)).tolist())


@dataclass(frozen=True, slots=True)
class Summary:
    """A contestant over all rounds.

    samples_per_s, bytes_per_s: on the clock. cpu_ms: processor time a sample, workers included.
    latency_ms: what one waits for a batch, of all rounds together: 50th, 95th and 99th percentile.
    """

    samples_per_s: Spread
    bytes_per_s: Spread
    cpu_ms: Spread
    latency_ms: tuple[float, float, float]


def measure(
    candidates: Mapping[str, Iterator[int]], *, rounds: int, lead: int, steps: int
) -> dict[str, list[Reading]]:
    """Readings of each contestant in `rounds` rounds, after one that warms up and does not count.

    A contestant is an endless iterator whose every item is a batch delivered, given as its number
    of samples. A turn takes `lead` batches, at least as many as a contestant holds ready, and then
    `steps` on the clock. Processor time is from rest to rest: that of the batches taken in the
    turn, no matter which of them were ready at its start, as many lie ready at its end.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in candidates}
    for warm in [False] + [True] * rounds:
        for name, batches in candidates.items():
            cpu = _at_rest()
            led = sum(next(batches) for _ in range(lead))
            times, timed = [time.perf_counter()], 0
            for _ in range(steps):
                timed += next(batches)
                times.append(time.perf_counter())
            cpu = _at_rest() - cpu
            if warm:
                wall, waits = times[-1] - times[0], tuple(np.diff(times).tolist())
                readings[name].append(Reading(wall / timed, cpu / (led + timed), waits))
    return readings


def cpu_seconds() -> float:
    """Processor time of this process, of workers that have ended and of those that live."""
    ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(usage.ru_utime + usage.ru_stime for usage in ended)
    tick = os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        # Fields 14 and 15 of proc_pid_stat(5), counted after the name, which may hold blanks.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def summarise(readings: Iterable[Reading], sample_bytes: int) -> Summary:
    """The percentiles of a contestant's rounds, with samples of `sample_bytes` bytes."""
    readings = list(readings)
    waits = [wait for reading in readings for wait in reading.waits]
    return Summary(
        samples_per_s=Spread.of(1.0 / reading.wall for reading in readings),
        bytes_per_s=Spread.of(sample_bytes / reading.wall for reading in readings),
        cpu_ms=Spread.of(1e3 * reading.cpu for reading in readings),
        latency_ms=tuple(1e3 * np.percentile(waits, (50, 95, 99))),
    )


def ratio(one: Iterable[Reading], other: Iterable[Reading], quantity: Literal["wall", "cpu"]) -> Spread:
    """What `one` takes of `quantity` a sample for each that `other` takes, round by round."""
    pairs = zip(one, other, strict=True)
    return Spread.of(getattr(a, quantity) / getattr(b, quantity) for a, b in pairs)


def save(name: str, options: Mapping[str, Any], results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `results` to a dated JSON file with the options, versions and hardware behind them.

    Dataclasses are written as objects. Options that are paths are left out: they say where, not what.
    """
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": {key: value for key, value in options.items() if not isinstance(value, Path)},
        "versions": system_info.versions(),
        "hardware": system_info.hardware(),
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%dT%H%M%S')}_{name}.json"
    path.write_text(json.dumps(record, indent=2, default=asdict) + "\n")
    return path


def positive(text: str) -> int:
    """The whole number of at least 1 that an option gives."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def numbers(text: str) -> list[int]:
    """Such numbers, by commas."""
    return [positive(part) for part in text.split(",")]


def among(text: str, known: Iterable[str]) -> list[str]:
    """Words of `known`, by commas."""
    parts = text.split(",")
    if unknown := set(parts) - set(known):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(known)}")
    return parts


def _at_rest() -> float:
    """The processor time used, once nothing that works ahead uses more of it."""
    used, calm = cpu_seconds(), 0
    deadline = time.monotonic() + 60
    while calm < _POLLS:
        if time.monotonic() > deadline:
            raise RuntimeError("a contestant goes on working without being asked for a batch")
        time.sleep(_POLL)
        before, used = used, cpu_seconds()
        calm = calm + 1 if used - before < _IDLE * _POLL else 0
    return used
