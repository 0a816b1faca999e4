"""A folder of samples in the making, so that nothing is lost and nothing is made twice.

Files appear under their names only when they are whole. Each one that does is noted in a journal,
`.journal.<format>.<n>.jsonl` for writer n, from 1, which begins with the shape of the samples and goes on
in the lines that the manifest will have, each after one that says that it was begun, without files. A
run that is killed leaves the journals, which the next one brings together in number 0, and makes what
that does not vouch for. At the end they become the manifest and the list files, and are removed; so is
what the folder shall no longer have, which is noted till then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from pipelines.dataset.file_lists import DATA_LIST, LABEL_LIST, ListedFile, write_list
from pipelines.dataset.manifest import MANIFEST, Entry, Manifest
from pipelines.dataset.open import list_folder
from pipelines.errors import AccessError, DataError
from pipelines.formats.npy import DATA_SUFFIX, LABEL_SUFFIX
from pipelines.formats.registry import FORMATS
from pipelines.io import LOCK_FILE, final_name, remove_temporaries, write_chunks
from pipelines.sample import SampleSpec
from preprocess.conversion.survey import by_stem, refuse_others

_JOURNAL = re.compile(r"\.journal\.(?P<form>\w+)\.(?P<writer>\d+)\.jsonl")
_OURS = (MANIFEST, DATA_LIST, LABEL_LIST)


class Ready(NamedTuple):
    """What is in a folder that may be written into.

    known: what is noted of the entries that it shall have, by stem.
    unwanted: others that are noted, to stay so until their files are gone.
    surplus: the stems of their files, and of those that nobody has noted, for `clear`.
    """

    known: dict[str, Entry]
    unwanted: list[Entry]
    surplus: list[str]


def begin(
    folder: Path,
    format_name: str,
    spec: SampleSpec,
    stems: Iterable[str],
    source: Iterable[str],
    *,
    prune: bool,
) -> Ready:
    """Make `folder`, which is there, ready for the entries `stems` of `spec` as `format_name`.

    source: the stems of all samples of the source, of other splits too. What is in the folder of others
        is surplus, with `prune`, or refused.

    DataError where the folder holds something else. No sample is touched, but until `finish` there is
    no manifest. One process calls this, and nobody else may be writing there.
    """
    expected = set(stems)
    try:
        names = list_folder(folder)
        found = noted(folder, format_name, spec)
        files = by_stem(format_name, (name for name in names if not _is_of_writers(name, format_name)))
        refuse_others(folder, format_name, files, found, set(source), prune=prune)
        remove_temporaries(folder)
        if any(map(_is_note, names)):
            suspend(folder, format_name, spec, found.values())
    except OSError as error:
        raise AccessError.writing(folder, error) from error
    return Ready(
        {stem: entry for stem, entry in found.items() if stem in expected and entry.files},
        [entry for stem, entry in found.items() if stem not in expected],
        [stem for stem in files if stem not in expected],
    )


def noted(folder: Path, format_name: str, spec: SampleSpec) -> dict[str, Entry]:
    """What manifest and journals note of the files in `folder`, by stem; DataError for others than these.

    An entry without files is one that was begun and not finished: nothing vouches for what is there of it.
    """
    manifest = Manifest.load(folder)
    found = {entry.name: entry for entry in manifest.entries} if manifest else {}
    journals = [match for match in map(_JOURNAL.fullmatch, list_folder(folder)) if match]
    for other in [*([manifest.format_name] if manifest else []), *(match["form"] for match in journals)]:
        if other != format_name:
            raise DataError(folder, f"holds samples as {other}, not {format_name}", "choose another folder")
    if manifest:
        _check_shape(folder, manifest.spec, spec)
    # What a run has written follows what was there when it began.
    for match in sorted(journals, key=lambda match: int(match["writer"])):
        for line in (folder / match[0]).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                fields = json.loads(line)
                told = SampleSpec(**fields) if isinstance(fields, dict) else Entry.from_json(fields)
            except (ValueError, TypeError, OverflowError):
                continue  # Cut off when its writer was killed: the sample is made again.
            if isinstance(told, Entry):
                found[told.name] = told
            else:
                _check_shape(folder, told, spec)
    return found


def _check_shape(folder: Path, there: SampleSpec, spec: SampleSpec) -> None:
    if there != spec:
        fault = f"holds samples of shape {there.shape}, not {spec.shape}"
        raise DataError(folder, fault, "choose another folder")


def finish(folder: Path, format_name: str, spec: SampleSpec, entries: Sequence[Entry]) -> None:
    """Write the list files and the manifest of the samples `entries`, and remove the journals."""
    sizes = {entry.name + part.suffix: part.bytes for entry in entries for part in entry.files}
    for name, files in list_files(format_name, [entry.name for entry in entries]).items():
        # Where compressed files are staged, their lengths are wanted beforehand.
        sized = format_name == "tfrecord_gzip"
        write_list(folder / name, (ListedFile(file, sizes[file] if sized else None) for file in files))
    Manifest(format_name, spec, tuple(entries)).save(folder)
    _unlink(folder, filter(_JOURNAL.fullmatch, list_folder(folder)))


def suspend(folder: Path, format_name: str, spec: SampleSpec, entries: Iterable[Entry]) -> None:
    """Have nothing in `folder` vouch for other samples than `entries`, in one journal: more are to come."""
    journal = _journal(folder, format_name, 0)
    lines = (_head(spec), *(json.dumps(entry.to_json()) for entry in entries), "")
    write_chunks(journal, "\n".join(lines).encode())
    _unlink(folder, (name for name in list_folder(folder) if _is_note(name) and name != journal.name))


def clear(folder: Path, format_name: str, stems: Iterable[str]) -> None:
    """Remove the files of the entries `stems` as `format_name` from `folder`."""
    suffixes = FORMATS[format_name].extra_suffixes + FORMATS[format_name].suffixes
    _unlink(folder, (stem + suffix for stem in stems for suffix in suffixes))


def list_files(format_name: str, stems: Sequence[str]) -> dict[str, list[str]]:
    """The list files that go with the samples `stems` as `format_name`: what each one names."""
    lists = (
        {LABEL_LIST: LABEL_SUFFIX, DATA_LIST: DATA_SUFFIX}
        if format_name == "npy"
        else {DATA_LIST: FORMATS[format_name].suffix}
    )
    return {name: [stem + suffix for stem in stems] for name, suffix in lists.items()}


def is_unfinished(name: str) -> bool:
    """Whether `name` is that of a file which a writer that was stopped has left."""
    return bool(_JOURNAL.fullmatch(name) or final_name(name))


class Journal:
    """The notes of rank `rank` on the samples of `spec` that it makes as `format_name` in `folder`."""

    def __init__(self, folder: Path, format_name: str, spec: SampleSpec, rank: int) -> None:
        self._path = _journal(folder, format_name, rank + 1)
        try:
            self._file = open(self._path, "w", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise AccessError.writing(self._path, error) from error
        self._file.write(f"{_head(spec)}\n")  # With the first note to the disk.

    def begin(self, stems: Iterable[str]) -> None:
        """Note that files of `stems` may be written from now on, so that no earlier note vouches for them."""
        self._write(json.dumps(Entry(stem, ()).to_json()) for stem in stems)

    def add(self, entry: Entry) -> None:
        """Note that the files of `entry` are whole under their names."""
        self._write([json.dumps(entry.to_json())])

    def _write(self, lines: Iterable[str]) -> None:
        try:
            self._file.writelines(f"{line}\n" for line in lines)
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


def _is_of_writers(name: str, format_name: str) -> bool:
    """Whether `name` is that of a note, or of something else that writers of `format_name` leave."""
    final, suffixes = final_name(name), FORMATS[format_name].suffixes + FORMATS[format_name].extra_suffixes
    return (
        _is_note(name) or name == LOCK_FILE or bool(final and (_is_note(final) or final.endswith(suffixes)))
    )


def _is_note(name: str) -> bool:
    """Whether `name` is that of a file that vouches for others."""
    return name in _OURS or bool(_JOURNAL.fullmatch(name))


def _head(spec: SampleSpec) -> str:
    """The first line of a journal."""
    return json.dumps({"size": spec.size, "channels": spec.channels})


def _journal(folder: Path, format_name: str, writer: int) -> Path:
    return folder / f".journal.{format_name}.{writer}.jsonl"


def _unlink(folder: Path, names: Iterable[str]) -> None:
    try:
        for name in names:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise AccessError.writing(folder, error) from error
