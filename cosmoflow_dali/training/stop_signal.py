"""Requests to stop training, as signals."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Either asks training to stop. mpirun forwards the second, and kills its ranks at the first."""


class StopSignal:
    """Records, while used as a context, that the process was asked to stop.

    Attributes:
        received: One of `STOP_SIGNALS` has arrived.
    """

    received = False

    def __enter__(self) -> StopSignal:
        self._handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
