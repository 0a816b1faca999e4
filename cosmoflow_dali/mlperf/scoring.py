"""The scores of a system's runs: the figures that a submission reports.

They follow the MLPerf HPC training rules; parse_logs.py names the documents.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cosmoflow_dali.mlperf.parse_logs import Run, System


@dataclass(frozen=True, slots=True)
class Score:
    """The runs of one system and their score; times in minutes, None if the rules give no figure.

    Attributes:
        scaling: "strong", called Time To Solution since v3.0, or "weak", called Throughput.
        time_to_train: Mean without the fastest and the slowest run. An invalid strong run counts as endless,
            so one may be dropped as the slowest and two leave no score (training rules, section Benchmark
            Results); of weak ones submitters may prune any (HPC rules, section Throughput).
        at_once: Largest number of valid runs at the same time.
        time_to_train_all: TTTa, from the first run_start to the last run_stop of the valid runs (HPC rules,
            section Throughput). It excludes staging that ends before run_start.
        models_per_minute: Models trained, divided by TTTa.
    """

    system: System
    scaling: str
    runs: tuple[Run, ...]
    time_to_train: float | None
    at_once: int
    time_to_train_all: float | None
    models_per_minute: float | None

    @property
    def valid_runs(self) -> tuple[Run, ...]:
        """The valid runs."""
        return tuple(run for run in self.runs if run.is_valid)

    def mean(self, figure: str) -> float | None:
        """Return the mean of attribute `figure` over the valid runs that have it."""
        values = [value for run in self.valid_runs if (value := getattr(run, figure)) is not None]
        return statistics.fmean(values) if values else None


def summarize(runs: Sequence[Run]) -> list[Score]:
    """Return the scores of `runs`, one per system and kind of scaling.

    Runs of a system that overlap in time are weak scaling, unless a folder's name says otherwise.
    """
    systems: dict[tuple[System, str | None], list[Run]] = defaultdict(list)
    seen = set()
    for run in runs:
        if run.system is not None and run.content not in seen:
            seen.add(run.content)
            systems[run.system, run.scaling].append(run)
    return [
        _score(system, scaling, sorted(members, key=lambda run: math.inf if run.start is None else run.start))
        for (system, scaling), members in systems.items()
    ]


def _score(system: System, scaling: str | None, runs: Sequence[Run]) -> Score:
    valid = [run for run in runs if run.is_valid]
    spans = [(run.start, run.stop) for run in valid if run.start is not None and run.stop is not None]
    at_once = max((sum(a <= start < b for a, b in spans) for start, _ in spans), default=0)
    scaling = scaling or ("weak" if at_once > 1 else "strong")
    times = [run.minutes if run.is_valid and run.minutes else math.inf for run in runs]
    if scaling == "weak":
        times = [time for time in times if time < math.inf]
    middle = sorted(times)[1:-1]
    time = statistics.fmean(middle) if middle and max(middle) < math.inf else None
    whole = None
    if scaling == "weak" and spans:
        whole = (max(stop for _, stop in spans) - min(start for start, _ in spans)) / 60
    return Score(system, scaling, tuple(runs), time, at_once, whole, len(spans) / whole if whole else None)
