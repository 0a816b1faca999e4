"""Input and result of a task: the entries of one source, converted in a worker unless they are up to date."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from pipelines.dataset.manifest import Entry, SourceFingerprint
from pipelines.errors import AccessError, DataError, UnreadableError, UserError
from pipelines.io import WrittenFile
from pipelines.storage.location import Location
from pipelines.storage.uploads import InterruptedUploadError
from preprocess.conversion.journal import write_records
from preprocess.conversion.read_failures import ConsecutiveReadFailures

_ATTEMPTS = 3
"""Attempts with an upload that breaks off."""


class WorkItem(NamedTuple):
    """A source that is converted at a time.

    source: What the task reads it by; picklable.
    entries: Names of the entries that it becomes.
    recorded: Records of those that an earlier run finished.
    journal: Where the task records them itself; None if this is done in the journal of its rank.
    """

    source: Any
    entries: Sequence[str]
    recorded: Sequence[Entry] = ()
    journal: Location | None = None

    def records(self, written: Sequence[Entry]) -> list[Entry]:
        """Return the records of all finished entries, once those of `written` are."""
        names = {entry.name for entry in written}
        return [*written, *(entry for entry in self.recorded if entry.name not in names)]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Result of a task for one source.

    written: Records of the entries that were converted.
    up_to_date: Whether all entries were there, complete and made from the present source.
    faults: One line for each sample that is damaged or cannot be read. Files of an earlier state of the
        source stay.
    unreadable: The fault of each of its files by path if none of them could be read.
    """

    written: Sequence[Entry] = ()
    up_to_date: bool = False
    faults: Sequence[str] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)


Announce: TypeAlias = Callable[[Sequence[WrittenFile]], None]
"""Records the files of an entry, which are complete, before the last of them appears under its name."""


class DamagedSourceError(UserError):
    """Samples of a source cannot be converted; raised and caught in the task that converts it.

    Args:
        errors: One for each of these samples.
        samples: Number of all samples of the source.

    Attributes:
        faults: One line for each of them.
        unreadable: The fault of each of their files by path if no sample of the source could be read.
    """

    def __init__(self, errors: Sequence[DataError], samples: int = 1) -> None:
        super().__init__(f"{len(errors)} samples cannot be converted, the first of them: {errors[0]}")
        self.faults = tuple(map(str, errors))
        unreadable = [error for error in errors if isinstance(error, UnreadableError)]
        none_read = len(unreadable) == samples
        self.unreadable = {error.path: error.fault for error in unreadable} if none_read else {}


def convert_if_stale(
    item: WorkItem,
    target: Location,
    fingerprint: Callable[[], SourceFingerprint],
    convert: Callable[[Announce], Iterable[tuple[str, Sequence[WrittenFile]]]],
) -> TaskResult:
    """Convert one source unless its entries in `target` are complete and made from its present state.

    Args:
        item: The source and what is recorded of its entries.
        target: Folder of the entries.
        fingerprint: Returns the present fingerprint of the source.
        convert: Writes the entries one after the other; yields the name and the files of each. It may call
            its argument with the files of the only entry before the last of them appears.

    Raises:
        AccessError: `target` cannot be written, or the folder of the source cannot be read.
    """
    source: SourceFingerprint | None = None
    with contextlib.suppress(UnreadableError):  # `convert` raises it with the file and the reason.
        source = fingerprint()
    # In a store, `recorded` are those that are complete: its folder has been listed.
    complete = [
        entry
        for entry in item.recorded
        if entry.source == source and (item.journal or entry.is_complete_in(target))
    ]
    if source and len(complete) == len(item.entries):
        return TaskResult(up_to_date=True)
    if item.journal and item.recorded:
        write_records(item.journal, [Entry(name, ()) for name in item.entries])

    def announce(files: Sequence[WrittenFile]) -> None:
        # A run that is killed between the last file and its record would upload it again. Another file may
        # be there if there is an earlier record.
        if item.journal and not item.recorded:
            (name,) = item.entries
            announced[:] = [Entry.from_written(name, files, source)]
            write_records(item.journal, announced)

    announced: list[Entry] = []
    written: list[Entry] = []
    damage: DamagedSourceError | None = None
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            written.clear()
            try:
                for name, files in convert(announce):
                    written.append(Entry.from_written(name, files, source))
                break
            except InterruptedUploadError:
                if attempt == _ATTEMPTS:
                    raise
    except DamagedSourceError as error:
        damage = error
    except DataError as error:
        if isinstance(error, AccessError) and not isinstance(error, UnreadableError):
            raise
        damage = DamagedSourceError([error])
    if item.journal and (records := item.records(written)) != announced:
        write_records(item.journal, records)
    if damage is None:
        return TaskResult(written)
    # One failure does not end the run, but a folder that has gone does.
    ConsecutiveReadFailures().record(damage.unreadable)
    return TaskResult(written, faults=damage.faults, unreadable=damage.unreadable)
