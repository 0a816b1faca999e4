"""A folder of samples in the making, so that nothing is lost and nothing is made twice.

Files appear under their names only when they are whole. Each one that does is noted in a journal,
`.journal.<format>.<n>.jsonl` for writer n, from 1, in the lines that the manifest will have; a run
that is killed leaves the journals, which the next one brings together in number 0, and makes what
that does not vouch for. At the end they become the manifest and the list files, and are removed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.dataset import list_folder
from pipelines.errors import AccessError, DataError, UnreadableError, UserError
from pipelines.files import Written, final_name, remove_temporaries, write_chunks
from pipelines.formats import FORMATS
from pipelines.formats.npy import DATA, LABEL
from pipelines.lists import DATA_LIST, LABEL_LIST, Listed, write_list
from pipelines.manifest import MANIFEST, Entry, Manifest, Source
from pipelines.sample import SampleSpec
from preprocess.lost import Lost

_JOURNAL = re.compile(r"\.journal\.(?P<form>\w+)\.(?P<writer>\d+)\.jsonl")
_OURS = (MANIFEST, DATA_LIST, LABEL_LIST)


def begin(folder: Path, form: str, spec: SampleSpec, stems: Iterable[str]) -> dict[str, Entry]:
    """Make `folder` ready for the samples `stems` of `spec` as `form`: what it has of them, by stem.

    What was made of other samples of this source, which are no longer wanted, is removed. DataError
    where the folder holds something else, which is left as it is. One process calls this, and
    nobody else may be writing there.
    """
    expected = set(stems)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = list_folder(folder)
        found = noted(folder, form, spec)
        known = {stem: entry for stem, entry in found.items() if stem in expected}
        unwanted = [entry for stem, entry in found.items() if stem not in expected]
        _check(folder, form, expected, names, unwanted)
        remove_temporaries(folder)
        if unwanted or any(map(_JOURNAL.fullmatch, names)):
            suspend(folder, form, known.values())
        remove(folder, unwanted)
    except OSError as error:
        raise AccessError.writing(folder, error) from error
    return known


def noted(folder: Path, form: str, spec: SampleSpec) -> dict[str, Entry]:
    """What manifest and journals note of the files in `folder`, by stem; DataError for others than these."""
    manifest = Manifest.load(folder)
    found = {entry.stem: entry for entry in manifest.entries} if manifest else {}
    journals = [match for match in map(_JOURNAL.fullmatch, list_folder(folder)) if match]
    for other in [*([manifest.form] if manifest else []), *(match["form"] for match in journals)]:
        if other != form:
            raise DataError(folder, f"holds samples as {other}, not {form}", "choose another folder")
    if manifest and manifest.spec != spec:
        fault = f"holds samples of shape {manifest.spec.shape}, not {spec.shape}"
        raise DataError(folder, fault, "choose another folder")
    # What a run has written follows what was there when it began.
    for match in sorted(journals, key=lambda match: int(match["writer"])):
        for line in (folder / match[0]).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = Entry.from_json(json.loads(line))
            except (ValueError, TypeError, OverflowError):
                continue  # Cut off when its writer was killed: the sample is made again.
            found[entry.stem] = entry
    return found


def finish(folder: Path, form: str, spec: SampleSpec, entries: Sequence[Entry]) -> None:
    """Write the list files and the manifest of the samples `entries`, and remove the journals."""
    sizes = {entry.stem + part.suffix: part.bytes for entry in entries for part in entry.parts}
    for name, files in list_files(form, [entry.stem for entry in entries]).items():
        # Where compressed files are staged, their lengths are wanted beforehand.
        sized = form == "tfrecord_gzip"
        write_list(folder / name, (Listed(file, sizes[file] if sized else None) for file in files))
    Manifest(form, spec, tuple(entries)).save(folder)
    _unlink(folder, filter(_JOURNAL.fullmatch, list_folder(folder)))


def suspend(folder: Path, form: str, entries: Iterable[Entry]) -> None:
    """Have nothing in `folder` vouch for other samples than `entries`, in one journal: more are to come."""
    journal = _journal(folder, form, 0)
    write_chunks(journal, "".join(f"{json.dumps(entry.to_json())}\n" for entry in entries).encode())
    _unlink(folder, (name for name in list_folder(folder) if _is_note(name) and name != journal.name))


def remove(folder: Path, entries: Iterable[Entry]) -> None:
    """Remove those files of `entries` from `folder` that are as noted."""
    for entry in entries:
        _unlink(folder, _whole(folder, entry))


def list_files(form: str, stems: Sequence[str]) -> dict[str, list[str]]:
    """The list files that go with the samples `stems` as `form`: what each one names."""
    lists = {LABEL_LIST: LABEL, DATA_LIST: DATA} if form == "npy" else {DATA_LIST: FORMATS[form].suffix}
    return {name: [stem + suffix for stem in stems] for name, suffix in lists.items()}


def is_unfinished(name: str) -> bool:
    """Whether `name` is that of a file which a writer that was stopped has left."""
    return bool(_JOURNAL.fullmatch(name) or final_name(name))


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
        unless it is an AccessError of what is written, or the source's folder is lost too; what was
        made of the source before is then removed.

    The answer's "unread" is for `Lost.note`.
    """
    source: Source | None = None
    with contextlib.suppress(UnreadableError):  # Who reads it tells which file, and why.
        source = origin()
    known = [Entry.from_json(line) for _, line in wanted if line is not None]
    whole = [entry for entry in known if source and entry.source == source and entry.is_whole_in(target)]
    if len(whole) == len(wanted):
        return {"made": [], "kept": [entry.stem for entry in whole], "faults": [], "unread": {}}
    made: list[Any] = []
    faults: list[str] = []
    unread: Mapping[str, str] = {}
    try:
        for stem, written in make():
            made.append(Entry.of(stem, written, source).to_json())
    except UnreadableError as error:
        faults.append(str(error))
        unread = {error.path: error.fault}
    except AccessError:
        raise
    except DataError as error:
        faults.append(str(error))
    except DamagedError as error:
        faults += error.faults
        unread = error.unread
    Lost().note(unread)
    if faults:
        anew = {line[0] for line in made}
        remove(target, (entry for entry in known if entry.stem not in anew))
    return {"made": made, "kept": [], "faults": faults, "unread": unread}


class DamagedError(UserError):
    """Several samples that are to become one file are damaged: a line each.

    unread: if not one of their files could be read, the fault of each by its path.
    """

    def __init__(self, faults: Sequence[str], unread: Mapping[str, str] | None = None) -> None:
        self.faults, self.unread = tuple(faults), dict(unread or {})
        super().__init__(f"{len(faults)} samples are damaged, the first of them: {faults[0]}")

    def __reduce__(self) -> tuple[type[DamagedError], tuple[tuple[str, ...], dict[str, str]]]:
        return type(self), (self.faults, self.unread)


class Journal:
    """The notes of writer `number`, from 0, of the samples that it has finished as `form` in `folder`."""

    def __init__(self, folder: Path, form: str, number: int) -> None:
        self._path = _journal(folder, form, number + 1)
        try:
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise AccessError.writing(self._path, error) from error

    def add(self, entry: Entry) -> None:
        """Note that the files of `entry` are whole under their names."""
        try:
            self._file.write(f"{json.dumps(entry.to_json())}\n")
            self._file.flush()
        except OSError as error:
            raise AccessError.writing(self._path, error) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as late:
            # What could not be written is tried once more; who knows of that is not to hear of it anew.
            if error is None:
                raise AccessError.writing(self._path, late) from late


def _check(
    folder: Path, form: str, expected: set[str], names: Sequence[str], unwanted: Sequence[Entry]
) -> None:
    """Refuse a folder that holds samples of another source, or no samples at all."""
    parts = FORMATS[form].parts + FORMATS[form].extras
    left = {name for entry in unwanted if entry.source for name in _whole(folder, entry)}
    wanted = False
    for name in names:
        final = final_name(name)
        if _is_note(name) or (final and (_is_note(final) or final.endswith(parts))):
            continue
        suffix = next((part for part in parts if name.endswith(part)), None)
        if suffix is not None and name.removesuffix(suffix) in expected:
            wanted = True
        elif name not in left:
            fault = f"holds {name}, which is no sample of the source as {form}"
            raise DataError(folder, fault, "remove it, or choose another folder")
    if left and not wanted:
        # Made of another source: whoever named the wrong folder shall not lose what is in it.
        raise DataError(folder, f"holds {min(left)} and no sample of this source", "choose another folder")


def _is_note(name: str) -> bool:
    """Whether `name` is that of a file that vouches for others."""
    return name in _OURS or bool(_JOURNAL.fullmatch(name))


def _journal(folder: Path, form: str, writer: int) -> Path:
    return folder / f".journal.{form}.{writer}.jsonl"


def _whole(folder: Path, entry: Entry) -> list[str]:
    """The names of the files of `entry` that are in `folder` and as long as noted."""
    files = ((path, part) for path, part in entry.files(folder) if path.is_file())
    return [path.name for path, part in files if path.stat().st_size == part.bytes]


def _unlink(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
