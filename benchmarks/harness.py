"""What every benchmark shares: fair turns, CPU beside wall time, and a record of what ran where.

Machines are noisy, so contestants take turns within one run and are compared by the ratios of the
same round; a ratio's spread over the rounds says what it is worth.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cosmoflow_dali import machine

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Reading:
    """One contestant's turn in one round: seconds a sample on the clock and on all processors."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The middle of a contestant's rounds, and the lowest and highest.

    samples_per_s: on the clock. cpu_ms: processor time a sample, of this process and its workers.
    """

    samples_per_s: float
    cpu_ms: float
    cpu_ms_range: tuple[float, float]


def take_turns(contestants: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[Reading]]:
    """Readings of each contestant in `rounds` rounds, after one that does not count.

    A contestant is a function that delivers samples and returns how many.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in contestants}
    for counts in [False] + [True] * rounds:
        for name, deliver in contestants.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            samples = deliver()
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
            if counts:
                readings[name].append(Reading(wall / samples, cpu / samples))
    return readings


def cpu_seconds() -> float:
    """Processor time of this process, of workers that have ended and of those that live."""
    ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    total = sum(usage.ru_utime + usage.ru_stime for usage in ended)
    tick = os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        # Fields 14 and 15 of proc_pid_stat(5), counted behind the name, which may hold blanks.
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def summarise(readings: list[Reading]) -> Summary:
    """The medians of a contestant's rounds."""
    cpu = [1e3 * reading.cpu for reading in readings]
    wall = statistics.median(reading.wall for reading in readings)
    return Summary(1.0 / wall, statistics.median(cpu), (min(cpu), max(cpu)))


def ratios(one: list[Reading], other: list[Reading], quantity: str) -> tuple[float, float, float]:
    """(median, lowest, highest) over rounds of `one` / `other` in "wall" or "cpu"."""
    each = [getattr(a, quantity) / getattr(b, quantity) for a, b in zip(one, other, strict=True)]
    return statistics.median(each), min(each), max(each)


def save(name: str, options: Mapping[str, Any], results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `results` to a dated JSON file with the options, versions and hardware behind them."""
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "options": dict(options),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "results": {
            key: asdict(value) if isinstance(value, Summary) else value for key, value in results.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d')}_{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
