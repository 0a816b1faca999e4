"""Progress of a long command on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

STOPPED = "stopped; the same command resumes"
"""The last line of a command that Ctrl-C has ended."""


def track(items: Iterable[T], total: int, label: str, unit: str, *, shown: bool) -> Iterator[T]:
    """Yield `items` and show a bar: at once on a terminal, every 15 s elsewhere."""
    seconds = 0.1 if sys.stderr.isatty() else 15.0
    yield from tqdm(items, label, total, unit=unit, disable=not shown, mininterval=seconds, delay=seconds)
