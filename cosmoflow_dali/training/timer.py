"""The clock of the training loop: how long it took, and how much of that it waited for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from pipelines.sample import Batch


class Clock:
    """Seconds spent waiting for data and spent in all, since `reset` and since the beginning."""

    def __init__(self) -> None:
        self.total = self.total_waited = 0.0
        self._waited = 0.0
        self._start = time.perf_counter()

    def reset(self) -> None:
        """Begin a new interval now; what passed since the last one is not counted."""
        self._waited, self._start = 0.0, time.perf_counter()

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, with the time that each takes to come counted as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def read(self) -> tuple[float, float]:
        """(seconds, seconds waited) of the interval that ends now; the next one begins."""
        seconds, waited = time.perf_counter() - self._start, self._waited
        self.total += seconds
        self.total_waited += waited
        self.reset()
        return seconds, waited
