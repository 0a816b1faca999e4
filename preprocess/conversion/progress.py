"""Progress of a long command: a bar on a terminal, and a line every 15 s elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

STOPPED = "stopped; the same command resumes"
"""The last line of a command that Ctrl-C has ended."""

_LINE_SECONDS = 15.0
"""Seconds between lines where stderr is not a terminal."""


@contextlib.contextmanager
def progress(total: int, label: str, unit: str, *, shown: bool) -> Iterator[Callable[[], object]]:
    """Yield a function to call after each of `total` units, as in "simulated 3 of 8 universes"."""
    if not shown:
        yield lambda: None
    elif sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit=unit, smoothing=0.1) as bar:
            yield bar.update
    else:
        start = printed = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, printed
            done, now = done + 1, time.monotonic()
            if now - printed >= _LINE_SECONDS:
                printed, left = now, (now - start) / done * (total - done)
                print(f"{label} {done} of {total} {unit}s, {left:.0f} s left", file=sys.stderr)

        yield advance
