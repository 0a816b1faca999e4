"""Timer of the training loop: total time, and the part of it spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from pipelines.sample import Batch


class StepTimer:
    """Measures intervals of training.

    Attributes:
        total: Seconds of all intervals so far.
        total_waited: Seconds of these spent waiting for data.
    """

    def __init__(self) -> None:
        self.total = self.total_waited = 0.0
        self.reset()

    def reset(self) -> None:
        """Start a new interval; time since the last one is not counted."""
        self._waited, self._start = 0.0, time.perf_counter()

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over `batches`; count the time until each arrives as waiting."""
        start = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Return the seconds, and the seconds waited, of the interval; start the next one."""
        seconds, waited = time.perf_counter() - self._start, self._waited
        self.total += seconds
        self.total_waited += waited
        self.reset()
        return seconds, waited
