"""Reasons for the end of training, and requests for it as signals."""

from __future__ import annotations

import signal
from collections.abc import Callable
from enum import Enum
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Each asks training to stop. mpirun forwards the second, and kills its ranks at the others. A terminal that
is closed sends the third."""


def handle_stop_signals(handler: Callable[[int, FrameType | None], object]) -> dict[signal.Signals, Any]:
    """Call `handler` at each of `STOP_SIGNALS`; return the earlier handlers of these."""
    # nohup has a program ignore SIGHUP, so that it outlives the terminal.
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in ignored}


class StopReason(Enum):
    """Reason for the end of training."""

    REACHED = "reached"
    """The target quality was reached."""
    FINISHED = "finished"
    """All epochs are done."""
    STOPPED = "stopped"
    """A signal asked for it; a checkpoint was saved."""


class StopSignal:
    """Records, while used as a context, that the process was asked to stop.

    Attributes:
        received: One of `STOP_SIGNALS` has arrived.
    """

    received = False

    def __enter__(self) -> StopSignal:
        self._handlers = handle_stop_signals(self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
