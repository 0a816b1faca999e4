"""Wall and CPU time of calls on any device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(act: Callable[[], object], times: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds of wall and CPU time for `times` calls."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        act()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronize(device: torch.device) -> None:
    """Wait for all work on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
