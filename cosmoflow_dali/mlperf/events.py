"""What the lines of an MLPerf log tell of its run."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mlperf_logging.mllog import constants

TARGET_MAE = 0.124
"""What the HPC rules ask of CosmoFlow (section Benchmarks)."""


class Events:
    """The lines of a log up to run_stop: what comes after it, such as idle epochs, is no part of the run."""

    def __init__(self, lines: Sequence[Any]) -> None:
        # The parser takes "NaN" for a time.
        lines = [line for line in lines if math.isfinite(line.timestamp)]
        keys = [line.key for line in lines]
        self._times = Counter(keys)
        end = keys.index(constants.RUN_STOP) + 1 if constants.RUN_STOP in keys else len(keys)
        self.lines = lines[:end]
        self._first = {line.key: line for line in reversed(self.lines)}
        self.start, self.stop = (self.seconds(key) for key in (constants.RUN_START, constants.RUN_STOP))
        begun = self._first.get(constants.RUN_START)
        self.source = str(_metadata(begun).get("file", "")) if begun else ""

    def value(self, key: str, default: object = None) -> Any:
        """The value of the first event called `key`."""
        return self._first[key].value["value"] if key in self._first else default

    def count(self, key: str) -> int | None:
        """The value of `key` if it is a whole number."""
        value = self.value(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    def seconds(self, key: str) -> float | None:
        """When the first event called `key` was, in Unix time."""
        return self._first[key].timestamp / 1000 if key in self._first else None

    def errors(self) -> list[tuple[float, float]]:
        """The epochs of the evaluations and their mean absolute errors."""
        found = []
        for line in self.lines:
            error, epoch = line.value["value"], _metadata(line).get("epoch_num")
            if line.key == "eval_error" and isinstance(error, int | float) and isinstance(epoch, int | float):
                found.append((epoch, float(error)))
        return found

    def epochs_to_target(self) -> float | None:
        """The epoch of the first evaluation that met the target."""
        return next((epoch for epoch, error in self.errors() if 0 < error <= TARGET_MAE), None)

    def training_seconds(self) -> list[float]:
        """Of each epoch, from its start to its evaluation's, or to its own end where that is first."""
        ends = (constants.EVAL_START, constants.EPOCH_STOP)
        seconds, began = [], None
        for line in self.lines:
            if line.key == constants.EPOCH_START:
                began = line.timestamp
            elif line.key in ends and began is not None:
                seconds.append((line.timestamp - began) / 1000)
                began = None
        return seconds

    def invalid_reasons(self) -> Iterator[str]:
        """Why this is not one run that converged."""
        started, stopped = (self._times[key] for key in (constants.RUN_START, constants.RUN_STOP))
        if started > 1 or stopped > 1:
            yield f"holds {max(started, stopped)} runs or ranks; a log is of one run, by one rank"
        elif self.start is None:
            yield "has no run_start"
        elif self.stop is None:
            yield "is cut off: has no run_stop"
        elif self.stop <= self.start:
            yield "its run_stop is not later than its run_start"
        if self.stop is None:
            return
        status = _metadata(self._first[constants.RUN_STOP]).get("status")
        if status != "success":
            yield f"the run ended with the status {status}"
        if self.epochs_to_target() is None:
            best = min((error for _, error in self.errors() if error > 0), default=math.nan)
            yield f"did not converge: its best error is {best:.4f}, the target {TARGET_MAE}"


def _metadata(line: Any) -> dict[str, Any]:
    metadata = line.value["metadata"]
    return metadata if isinstance(metadata, dict) else {}


def rate(events: Events, accelerators: int | None) -> float | None:
    """Training samples a second on each accelerator: the median over the run's epochs.

    An epoch's samples are all of train_samples, and its time is that of training alone, without
    evaluation. It is the median as neither the slow first epoch nor one that stalled tells of a machine's
    speed, and it is taken from the times as not every log has a throughput of its own.
    """
    samples, seconds = events.count(constants.TRAIN_SAMPLES), events.training_seconds()
    if not samples or not accelerators or not seconds or min(seconds) <= 0:
        return None
    return samples / statistics.median(seconds) / accelerators
