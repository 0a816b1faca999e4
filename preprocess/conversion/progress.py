"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

STOPPED = "stopped; the same command goes on from here"
"""The last line of work that Ctrl-C has ended."""

_LINE_SECONDS = 15.0
"""Between lines where stderr is no terminal."""


@contextlib.contextmanager
def progress(total: int, did: str, unit: str, *, shown: bool) -> Iterator[Callable[[], object]]:
    """A function to call after each of `total` units, as in "simulated 3 of 8 universes"."""
    if not shown:
        yield lambda: None
    elif sys.stderr.isatty():
        with tqdm(total=total, desc=did, unit=unit, smoothing=0.1) as bar:
            yield bar.update
    else:
        start = told = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, told
            done, now = done + 1, time.monotonic()
            if now - told >= _LINE_SECONDS:
                told, left = now, (now - start) / done * (total - done)
                print(f"{did} {done} of {total} {unit}s, {left:.0f} s left", file=sys.stderr)

        yield advance
