"""Records of a folder that is being filled: what a killed run had finished, and for which conversion.

Files appear under their names only when they are complete. Writer n, from 1, records in
`.journal.<format>.<n>.jsonl` each entry that it begins (without files) and each that it finishes (as in the
manifest). The first line of a journal holds the shape of the samples; that of journal 0, which a conversion
writes before anything else, also its other settings and its source: `samples_per_shard`, and `samples`, the
IDs of all samples of the source. At the end the manifest replaces the journals.

Objects of a store cannot be appended to. There journal n holds the records of the n-th source of the
conversion alone, and is written after its entries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.dataset.manifest import Entry, Manifest
from pipelines.dataset.open import list_folder
from pipelines.errors import DataError, MissingError, writing
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.sample import SampleSpec
from pipelines.storage.location import Location
from pipelines.storage.parallel import map_ahead
from pipelines.storage.select import storage_of

_NAME = ".journal.{}.{}.jsonl"
_JOURNAL = re.compile(r"\.journal\.(?P<format>\w+)\.(?P<writer>\d+)\.jsonl")


@dataclass(slots=True)
class TargetState:
    """Records of a target folder.

    entries: The latest record of each entry by name; one without files was begun and not finished.
    samples: IDs of the samples that the folder holds or was going to hold, as far as they are recorded.
    samples_per_shard: Samples of each shard but the last; None where that is not recorded.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    samples: set[str] = field(default_factory=set)
    samples_per_shard: int | None = None

    def add(self, entry: Entry) -> None:
        """Take in a later record."""
        self.entries[entry.name] = entry
        if entry.files:
            members = (member.rpartition("/")[2].removesuffix(MEMBER_SUFFIX) for member in entry.members)
            self.samples.update(members if entry.members else [entry.name])


def load_records(folder: Location, format_name: str, spec: SampleSpec) -> TargetState:
    """Return what the manifest and the journals in `folder` record.

    Raises:
        DataError: They are of another format or of samples of another shape than `spec`.
    """
    state = TargetState()
    if manifest := Manifest.load(folder):
        _check_same(folder, "format", manifest.format_name, format_name)
        _check_same(folder, "shape", manifest.spec.shape, spec.shape)
        for entry in manifest.entries:
            state.add(entry)
        if len(manifest.entries) > 1:
            state.samples_per_shard = len(manifest.entries[0].members) or None
    journals = [match for match in map(_JOURNAL.fullmatch, names_in(folder)) if match]
    # Journal 0 holds what there was before the others began.
    journals.sort(key=lambda match: int(match["writer"]))
    contents = map_ahead(storage_of(folder).read, (folder / journal[0] for journal in journals))
    for journal, content in zip(journals, contents, strict=True):
        _check_same(folder, "format", journal["format"], format_name)
        for line in content.decode("utf-8-sig", errors="replace").splitlines():
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    state.add(Entry.from_json(fields))
                    continue
                shape = SampleSpec(int(fields["size"]), int(fields["channels"])).shape
                state.samples_per_shard = fields.get("samples_per_shard", state.samples_per_shard)
                state.samples.update(fields.get("samples", ()))
            except (ValueError, TypeError, KeyError, OverflowError):
                continue  # Cut off when its writer was killed: the entry is converted again.
            _check_same(folder, "shape", shape, spec.shape)
    return state


def _check_same(folder: Location, what: str, there: Any, wanted: Any) -> None:
    if there != wanted:
        fault = f"holds samples of {what} {there}, not {wanted}"
        raise DataError(folder, fault, "convert into a new folder, or remove this one")


def names_in(folder: Location) -> list[str]:
    """Return the names in a folder that may not exist: one of a store does once it holds an object."""
    with suppress(MissingError):
        return list_folder(folder)
    return []


def is_journal(name: str) -> bool:
    """Return whether `name` is that of a journal."""
    return bool(_JOURNAL.fullmatch(name))


def write_journal(
    folder: Location, format_name: str, spec: SampleSpec, entries: Iterable[Entry], **settings: Any
) -> Location:
    """Write journal 0 with `entries`, and `settings` in its first line; return its path."""
    path = journal_path(folder, format_name, 0)
    storage_of(path).write(path, f"{_first_line(spec, **settings)}\n".encode(), _lines(entries))
    return path


def write_records(path: Location, entries: Iterable[Entry]) -> None:
    """Write the journal at `path`, which holds `entries` alone."""
    storage_of(path).write(path, _lines(entries))


def open_journal(
    folder: Location, format_name: str, spec: SampleSpec, rank: int
) -> AbstractContextManager[Journal | None]:
    """Return the journal of `rank` in `folder`; None in a folder of an object store, where tasks record."""
    return Journal(folder, format_name, spec, rank) if isinstance(folder, Path) else nullcontext()


class Journal:
    """Records of the entries that one rank writes into a folder."""

    def __init__(self, folder: Path, format_name: str, spec: SampleSpec, rank: int) -> None:
        self._path = folder / _NAME.format(format_name, rank + 1)
        with writing(self._path):
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self._file.write(f"{_first_line(spec)}\n")  # Written to the disk with the first record.

    def begin(self, names: Iterable[str]) -> None:
        """Record that files of the entries `names` may change from now on: earlier records no longer hold."""
        self.add(Entry(name, ()) for name in names)

    def add(self, entries: Iterable[Entry]) -> None:
        """Record that the files of `entries` are complete under their names."""
        with writing(self._path):
            self._file.writelines(f"{json.dumps(entry.to_json())}\n" for entry in entries)
            self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        # Closing tries a failed write again: the error is then the one that is raised already.
        with writing(self._path):
            self._file.close()


def _first_line(spec: SampleSpec, **settings: Any) -> str:
    return json.dumps({"size": spec.size, "channels": spec.channels, **settings})


def _lines(entries: Iterable[Entry]) -> bytes:
    return "".join(f"{json.dumps(entry.to_json())}\n" for entry in entries).encode()


def journal_path(folder: Location, format_name: str, writer: int) -> Location:
    """Return the path of the journal of `writer`, 0 for that of the conversion."""
    return folder / _NAME.format(format_name, writer)
