"""The entries of one source, made in a worker, and what becomes of them where the source is not sound."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import AccessError, DataError, UnreadableError, UserError
from pipelines.files import Written
from pipelines.manifest import Entry, Source
from preprocess.lost import Lost


def make_entries(
    target: Path,
    origin: Callable[[], Source],
    wanted: Sequence[tuple[str, Any]],
    make: Callable[[], Iterable[tuple[str, Sequence[Written]]]],
) -> dict[str, Any]:
    """Make the entries of one source in `target`, for a task of `preprocess.produce` to answer with.

    wanted: their stems, each with what is noted of it, an Entry as JSON, or None.
    origin: tells what they are to be made from.
    make: writes the files of each entry and yields its stem and them; asked if one of them is not
        there, whole and of this `origin`. Its DataError or DamagedError is the source's fault,
        unless it is an AccessError of what is written, or the source's folder is lost too.

    The answer: "made", entries; "kept", the stems of those that are as they were; "spoiled", entries made
    now or before of a source that is damaged; "faults", a line each; "unread", for `Lost.note`. Of a
    source that cannot be read, what was made before is kept: it may come back as it was.
    """
    source: Source | None = None
    with contextlib.suppress(UnreadableError):  # Who reads it tells which file, and why.
        source = origin()
    known = [Entry.from_json(line) for _, line in wanted if line is not None]
    whole = [entry for entry in known if source and entry.source == source and entry.is_whole_in(target)]
    if len(whole) == len(wanted):
        return _answer(kept=whole)
    made: list[Entry] = []
    faults: tuple[str, ...] = ()
    unread: Mapping[str, str] = {}
    damaged = False
    try:
        for stem, written in make():
            made.append(Entry.of(stem, written, source))
    except UnreadableError as error:
        faults, unread = (str(error),), {error.path: error.fault}
    except AccessError:
        raise
    except DataError as error:
        faults, damaged = (str(error),), True
    except DamagedError as error:
        faults, unread, damaged = error.faults, error.unread, error.damaged
    Lost().note(unread)
    anew = {entry.stem for entry in made}
    before = [entry for entry in known if entry.stem not in anew]
    if damaged:
        return _answer(spoiled=[*made, *before], faults=faults, unread=unread)
    kept = [entry for entry in before if entry.is_whole_in(target)]
    return _answer(made, kept, faults=faults, unread=unread)


def _answer(
    made: Sequence[Entry] = (),
    kept: Sequence[Entry] = (),
    spoiled: Sequence[Entry] = (),
    faults: Sequence[str] = (),
    unread: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """That of `make_entries`, as JSON can hold it."""
    return {
        "made": [entry.to_json() for entry in made],
        "kept": [entry.stem for entry in kept],
        "spoiled": [entry.to_json() for entry in spoiled],
        "faults": faults,
        "unread": unread or {},
    }


class DamagedError(UserError):
    """Several samples that are to become one file are damaged, or cannot be read: a line each.

    unread: if not one of their files could be read, the fault of each by its path.
    damaged: whether one of them is damaged, not only out of reach.
    """

    def __init__(
        self, faults: Sequence[str], unread: Mapping[str, str] | None = None, *, damaged: bool = True
    ) -> None:
        self.faults, self.unread, self.damaged = tuple(faults), dict(unread or {}), damaged
        super().__init__(f"{len(faults)} samples are damaged, the first of them: {faults[0]}")

    def __reduce__(self) -> tuple[Callable[..., DamagedError], tuple[tuple[str, ...], dict[str, str]]]:
        return partial(type(self), damaged=self.damaged), (self.faults, self.unread)
