"""The events of one MLPerf log, as `parse_logs` reads them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mlperf_logging.mllog import constants

TARGET_MAE = 0.124
"""Quality target of CosmoFlow (HPC rules, section Benchmarks)."""


class RunEvents:
    """The lines of a log up to run_stop; later ones, such as idle epochs, do not belong to the run.

    Attributes:
        lines: Parsed lines up to run_stop.
        start, stop: Unix time of run_start and run_stop in seconds; None if missing.
        source: File of the program that logged run_start.
    """

    def __init__(self, lines: Sequence[Any]) -> None:
        # The parser accepts NaN as a time.
        lines = [line for line in lines if math.isfinite(line.timestamp)]
        keys = [line.key for line in lines]
        self._times = Counter(keys)
        end = keys.index(constants.RUN_STOP) + 1 if constants.RUN_STOP in keys else len(keys)
        self.lines = lines[:end]
        self._first = {line.key: line for line in reversed(self.lines)}
        self.start, self.stop = (self.seconds(key) for key in (constants.RUN_START, constants.RUN_STOP))
        first = self._first.get(constants.RUN_START)
        self.source = str(_metadata(first).get("file", "")) if first else ""

    def value(self, key: str, default: object = None) -> Any:
        """Return the value of the first event `key`."""
        return self._first[key].value["value"] if key in self._first else default

    def count(self, key: str) -> int | None:
        """Return the value of the first event `key` if it is a whole number of at least 0."""
        value = self.value(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    def seconds(self, key: str) -> float | None:
        """Return the Unix time of the first event `key`."""
        return self._first[key].timestamp / 1000 if key in self._first else None

    def errors(self) -> list[tuple[float, float]]:
        """Return the epoch and the mean absolute error of each evaluation."""
        found = []
        for line in self.lines:
            error, epoch = line.value["value"], _metadata(line).get("epoch_num")
            if line.key == "eval_error" and isinstance(error, int | float) and isinstance(epoch, int | float):
                found.append((epoch, float(error)))
        return found

    def epochs_to_target(self) -> float | None:
        """Return the epoch of the first evaluation that met the target."""
        return next((epoch for epoch, error in self.errors() if 0 < error <= TARGET_MAE), None)

    def training_seconds(self) -> list[float]:
        """Return each epoch's seconds from its start to its evaluation, or to its end if that comes first."""
        seconds, start = [], None
        for line in self.lines:
            if line.key == constants.EPOCH_START:
                start = line.timestamp
            elif line.key in (constants.EVAL_START, constants.EPOCH_STOP) and start is not None:
                seconds.append((line.timestamp - start) / 1000)
                start = None
        return seconds

    def rate(self, accelerators: int | None) -> float | None:
        """Return training samples per second on each accelerator: the median over the epochs.

        An epoch has all of train_samples, and its time is that of training alone, without evaluation. The
        median ignores a slow first epoch and stalls. The times are used because not every log reports a
        throughput.
        """
        samples, seconds = self.count(constants.TRAIN_SAMPLES), self.training_seconds()
        if not samples or not accelerators or not seconds or min(seconds) <= 0:
            return None
        return samples / statistics.median(seconds) / accelerators

    def invalid_reasons(self) -> Iterator[str]:
        """Yield the reasons for which this is not one run that converged."""
        started, stopped = (self._times[key] for key in (constants.RUN_START, constants.RUN_STOP))
        if started > 1 or stopped > 1:
            yield f"contains {max(started, stopped)} runs or ranks; expected one run logged by one rank"
        elif self.start is None:
            yield "has no run_start"
        elif self.stop is None:
            yield "truncated: has no run_stop"
        elif self.stop <= self.start:
            yield "run_stop is not later than run_start"
        if self.stop is None:
            return
        status = _metadata(self._first[constants.RUN_STOP]).get("status")
        if status != "success":
            yield f"the run ended with status {status}"
        if self.epochs_to_target() is None:
            best = min((error for _, error in self.errors() if error > 0), default=math.nan)
            yield f"did not converge: best error {best:.4f}, target {TARGET_MAE}"


def _metadata(line: Any) -> dict[str, Any]:
    metadata = line.value["metadata"]
    return metadata if isinstance(metadata, dict) else {}
