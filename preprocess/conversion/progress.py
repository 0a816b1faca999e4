"""Progress of a long command on stderr, and what it waits for."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from pipelines.console import print_line
from pipelines.distributed.locks import locked
from pipelines.errors import writing
from pipelines.storage.location import Location

T = TypeVar("T")

STOPPED = "stopped; the same command resumes"
"""The last line of a command that Ctrl-C has ended."""


def lock_target(folder: Location, *, shown: bool = True) -> AbstractContextManager[int]:
    """Lock `folder`; print a line, if `shown`, when another process has to end first.

    Object stores have no locks: a folder there is locked for the processes of one user on one machine.
    """

    def wait(holder: str) -> None:
        if shown:
            print_line(f"{folder}: waiting for {holder}, which writes into it", sys.stderr)

    if isinstance(folder, Path):
        return locked(folder, wait)
    digest = hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()
    place = Path(tempfile.gettempdir(), f"cosmoflow-dali-{os.getuid()}", digest)
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    return locked(place, wait)


def track(items: Iterable[T], total: int, label: str, unit: str, *, shown: bool) -> Iterator[T]:
    """Yield `items` and show a bar: at once on a terminal, every 15 s elsewhere."""
    seconds = 0.1 if sys.stderr.isatty() else 15.0
    yield from tqdm(items, label, total, unit=unit, disable=not shown, mininterval=seconds, delay=seconds)
