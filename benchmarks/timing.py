"""What a call takes, on whatever device it computes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(act: Callable[[], object], times: int, device: torch.device) -> tuple[float, float]:
    """Seconds on the clock and of processors for `times` calls."""
    settle(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        act()
    settle(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def settle(device: torch.device) -> None:
    """Wait until `device` has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
