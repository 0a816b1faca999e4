"""The entries of one source, made in a worker, and what becomes of them where the source is not sound."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset.manifest import Entry, SourceFingerprint
from pipelines.errors import AccessError, DataError, UnreadableError, UserError
from pipelines.io import WrittenFile
from preprocess.conversion.read_failures import Lost


def make_entries(
    target: Path,
    origin: Callable[[], SourceFingerprint],
    wanted: Sequence[tuple[str, Any]],
    make: Callable[[], Iterable[tuple[str, Sequence[WrittenFile]]]],
    members: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the entries of one source in `target`, as a task of the engine returns them.

    wanted: their stems, each with what is noted of it, an Entry as JSON, or None.
    origin: tells what they are to be made from.
    make: writes the files of each entry and yields its stem and them; asked if one of them is not
        there, whole and of this `origin`. Its DataError or DamagedError is the source's fault,
        unless it is an AccessError of what is written, or the source's folder is lost too.
    members: the names of the members of each, if they are shards.

    The answer: "made", entries; "kept", the stems of those that are as they were; "spoiled", the stems
    of those whose files are to be removed; "faults", a line for what is damaged, and "lost", one for
    what cannot be read; "unread", for `Lost.note`. What was made before of a source that is damaged is
    spoiled; of one that cannot be read it is kept, since that may come back as it was.
    """
    source: SourceFingerprint | None = None
    with contextlib.suppress(UnreadableError):  # Who reads it tells which file, and why.
        source = origin()
    known = [Entry.from_json(line) for _, line in wanted if line is not None]
    whole = [entry for entry in known if entry.is_complete_in(target)]
    if source and len(whole) == len(wanted) and all(entry.source == source for entry in whole):
        return _answer(kept=whole)
    made: list[Entry] = []
    try:
        for stem, written in make():
            made.append(Entry.from_written(stem, written, source))
    except UnreadableError as error:
        fault = DamagedError([], [str(error)], {error.path: error.fault})
    except AccessError:
        raise
    except DataError as error:
        fault = DamagedError([str(error)], [], {})
    except DamagedError as error:
        fault = error
    else:
        return _answer(made)
    Lost().note(fault.unread)
    anew = {entry.name for entry in made}
    # A shard that was made before may hold other samples, which are in others by now.
    before = [entry for entry in whole if entry.name not in anew and entry.members == list(members)]
    if fault.faults:
        made, before = [], []
    sound = {entry.name for entry in (*made, *before)}
    return _answer(made, before, [stem for stem, _ in wanted if stem not in sound], fault)


def _answer(
    made: Sequence[Entry] = (),
    kept: Sequence[Entry] = (),
    spoiled: Sequence[str] = (),
    fault: DamagedError | None = None,
) -> dict[str, Any]:
    """That of `make_entries`, as JSON can hold it."""
    return {
        "made": [entry.to_json() for entry in made],
        "kept": [entry.name for entry in kept],
        "spoiled": spoiled,
        "faults": fault.faults if fault else (),
        "lost": fault.lost if fault else (),
        "unread": fault.unread if fault else {},
    }


class DamagedError(UserError):
    """Samples that are to become one file, or several, cannot be converted.

    faults, lost: a line for each that is damaged, and for each that cannot be read.
    unread: if not one of their files could be read, the fault of each by its path.
    """

    def __init__(self, faults: Sequence[str], lost: Sequence[str], unread: Mapping[str, str]) -> None:
        self.faults, self.lost, self.unread = tuple(faults), tuple(lost), dict(unread)
        lines = (*faults, *lost)
        super().__init__(f"{len(lines)} samples cannot be converted, the first of them: {lines[0]}")

    def __reduce__(self) -> tuple[type[DamagedError], tuple[Any, ...]]:
        return type(self), (self.faults, self.lost, self.unread)
