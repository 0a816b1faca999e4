"""A folder of samples in the making, so that nothing is lost and nothing is made twice.

Files appear under their names only when they are whole. Each one that does is noted in a journal,
`.journal.<format>.<n>.jsonl` for writer n, from 1, in the lines that the manifest will have; a run
that is killed leaves the journals, which the next one brings together in number 0, and makes what
that does not vouch for. At the end they become the manifest and the list files, and are removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from pipelines.errors import AccessError, DataError
from pipelines.files import LOCK, final_name, remove_temporaries, write_chunks
from pipelines.folder import list_folder
from pipelines.formats import FORMATS
from pipelines.formats.npy import DATA, LABEL
from pipelines.formats.packed import PackedFormat, member_stem, sample_members
from pipelines.lists import DATA_LIST, LABEL_LIST, Listed, write_list
from pipelines.manifest import MANIFEST, Entry, Manifest
from pipelines.sample import SampleSpec

_JOURNAL = re.compile(r"\.journal\.(?P<form>\w+)\.(?P<writer>\d+)\.jsonl")
_OURS = (MANIFEST, DATA_LIST, LABEL_LIST)


def begin(
    folder: Path, form: str, spec: SampleSpec, stems: Iterable[str], source: Iterable[str], *, prune: bool
) -> dict[str, Entry]:
    """Make `folder` ready for the entries `stems` of `spec` as `form`: what it has of them, by stem.

    source: all samples that there are to make entries of, here and elsewhere. What is in the folder
        of others goes, with `prune`, or is refused.

    Other entries of the source's samples, which are no longer wanted here, are removed. DataError where
    the folder holds something else, which is left as it is. One process calls this, and nobody else
    may be writing there.
    """
    expected, ours = set(stems), set(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = list_folder(folder)
        found = noted(folder, form, spec)
        known = {stem: entry for stem, entry in found.items() if stem in expected}
        unwanted = [entry for stem, entry in found.items() if stem not in expected]
        _check_samples(folder, form, ours, names, found, prune=prune)
        stray = _check_names(folder, form, expected, ours, names, unwanted)
        remove_temporaries(folder)
        if unwanted or any(map(_JOURNAL.fullmatch, names)):
            suspend(folder, form, known.values())
        remove(folder, unwanted)
        _unlink(folder, stray)
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
    return bool(name == LOCK or _JOURNAL.fullmatch(name) or final_name(name))


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


def _check_samples(
    folder: Path, form: str, ours: set[str], names: Sequence[str], found: Mapping[str, Entry], *, prune: bool
) -> None:
    """Refuse a folder that holds samples which are not `ours`: with `prune`, where it holds no others."""
    held: set[str] = set()
    there = set(names)
    for entry in found.values():
        if any(entry.stem + part.suffix in there for part in entry.parts):
            members = [member_stem(member.name) for part in entry.parts for member in part.members]
            held.update(members or [entry.stem])
    if form == PackedFormat.name:
        # What a shard holds its name does not tell; a run that was killed has left a few without a note.
        for name in names:
            stem = name.removesuffix(PackedFormat.suffix)
            if stem != name and stem not in found and stem not in ours:
                held.update(_members_of(folder / name))
    others = held - ours
    if others and others == held:
        # Whoever named the wrong folder shall not lose what is in it.
        fault = f"holds {min(others)} and no sample of this source"
        raise DataError(folder, fault, "choose another folder")
    if others and not prune:
        fault = f"holds samples that are not in the source, {len(others)} in all, the first {min(others)}"
        remedy = "bring them back there, choose another folder, or have them removed here with --prune"
        raise DataError(folder, fault, remedy)


def _members_of(shard: Path) -> list[str]:
    """The stems of the samples in `shard`: none if it is damaged, so that it can be made again."""
    try:
        return [member_stem(member.name) for member in sample_members(shard)]
    except AccessError:
        raise
    except DataError:
        return []


def _check_names(
    folder: Path,
    form: str,
    expected: set[str],
    ours: set[str],
    names: Sequence[str],
    unwanted: Sequence[Entry],
) -> list[str]:
    """Refuse a folder with files that nobody vouches for and that are not named as those of the source.

    Returns those named as samples that are `ours`, but not `expected` in this folder.
    """
    parts = FORMATS[form].parts + FORMATS[form].extras
    left = {name for entry in unwanted if entry.source for name in _whole(folder, entry)}
    stray: list[str] = []
    for name in names:
        final = final_name(name)
        if name == LOCK or _is_note(name) or (final and (_is_note(final) or final.endswith(parts))):
            continue
        suffix = next((part for part in parts if name.endswith(part)), None)
        stem = name.removesuffix(suffix) if suffix is not None else None
        if stem in expected or name in left:
            continue
        if stem not in ours:
            fault = f"holds {name}, which is no sample of the source as {form}"
            raise DataError(folder, fault, "remove it, or choose another folder")
        stray.append(name)
    return stray


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
