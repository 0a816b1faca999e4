"""A folder of samples in the making, so that nothing is lost and nothing is made twice.

Files appear under their names only when they are whole. Each one that does is noted in a journal,
`.journal.<n>.jsonl` for writer n, in the lines that the manifest will have; a run that is killed
leaves the journals, and the next one makes what they do not vouch for. At the end they become the
manifest and the list files, and are removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.dataset import list_folder
from pipelines.errors import AccessError, DataError, UserError
from pipelines.files import Written, is_temporary, remove_temporaries
from pipelines.formats import FORMATS
from pipelines.formats.npy import DATA, LABEL
from pipelines.lists import DATA_LIST, LABEL_LIST, Listed, write_list
from pipelines.manifest import MANIFEST, Entry, Manifest, Source
from pipelines.sample import SampleSpec

_JOURNAL = ".journal."
_OURS = (MANIFEST, DATA_LIST, LABEL_LIST)


def begin(folder: Path, form: str, stems: Iterable[str]) -> dict[str, Entry]:
    """Make `folder` ready for the samples `stems` in the format `form`: what it has of them, by stem.

    DataError where it holds something else, which is left as it is. One process calls this, and
    nobody else may be writing there.
    """
    expected = set(stems)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check(folder, form, expected, list_folder(folder))
        remove_temporaries(folder)
    except OSError as error:
        raise AccessError.writing(folder, error) from error
    manifest = Manifest.load(folder)
    known = {entry.stem: entry for entry in manifest.entries} if manifest else {}
    known.update((entry.stem, entry) for entry in _journals(folder))
    return {stem: entry for stem, entry in known.items() if stem in expected}


def finish(folder: Path, form: str, spec: SampleSpec, entries: Sequence[Entry]) -> None:
    """Write the list files and the manifest of the samples `entries`, and remove the journals."""
    sizes = {entry.stem + part.suffix: part.bytes for entry in entries for part in entry.parts}
    for name, files in list_files(form, [entry.stem for entry in entries]).items():
        # Where compressed files are staged, their lengths are wanted beforehand.
        sized = form == "tfrecord_gzip"
        write_list(folder / name, (Listed(file, sizes[file] if sized else None) for file in files))
    Manifest(form, spec, tuple(entries)).save(folder)
    for name in list_folder(folder):
        if name.startswith(_JOURNAL):
            (folder / name).unlink(missing_ok=True)


def list_files(form: str, stems: Sequence[str]) -> dict[str, list[str]]:
    """The list files that go with the samples `stems` as `form`: what each one names."""
    lists = {LABEL_LIST: LABEL, DATA_LIST: DATA} if form == "npy" else {DATA_LIST: FORMATS[form].suffix}
    return {name: [stem + suffix for stem in stems] for name, suffix in lists.items()}


def is_unfinished(name: str) -> bool:
    """Whether `name` is that of a file which a writer that was stopped has left."""
    return name.startswith(_JOURNAL) or is_temporary(name)


def make_entries(
    target: Path,
    origin: Source,
    wanted: Sequence[tuple[str, Any]],
    make: Callable[[], Iterable[tuple[str, Sequence[Written]]]],
) -> dict[str, Any]:
    """Make the entries of one source in `target`, for a task of `preprocess.produce` to answer with.

    wanted: their stems, each with what is noted of it, an Entry as JSON, or None.
    make: writes the files of each entry and yields its stem and them; asked if one of them is not
        there, whole and of this `origin`. Its DataError or DamagedError is the source's fault,
        unless it is an AccessError.
    """
    noted = [Entry.from_json(line) for _, line in wanted if line is not None]
    whole = [entry for entry in noted if entry.source == origin and entry.is_whole_in(target)]
    if len(whole) == len(wanted):
        return {"made": [], "kept": [entry.stem for entry in whole], "faults": []}
    made: list[Any] = []
    faults: list[str] = []
    try:
        for stem, written in make():
            made.append(Entry.of(stem, written, origin).to_json())
    except AccessError:
        raise
    except DataError as error:
        faults.append(str(error))
    except DamagedError as error:
        faults += error.faults
    return {"made": made, "kept": [], "faults": faults}


class DamagedError(UserError):
    """Several samples that are to become one file are damaged: a line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"{len(faults)} samples are damaged, the first of them: {faults[0]}")


class Journal:
    """Writer `number`'s notes of the samples that it has finished in `folder`."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = folder / f"{_JOURNAL}{number}.jsonl"
        try:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise AccessError.writing(self._path, error) from error
        # The last line of a writer that was killed may lack its end.
        self._start = "\n"

    def add(self, entry: Entry) -> None:
        """Note that the files of `entry` are whole under their names."""
        try:
            self._file.write(f"{self._start}{json.dumps(entry.to_json())}\n")
            self._file.flush()
        except OSError as error:
            raise AccessError.writing(self._path, error) from error
        self._start = ""

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _check(folder: Path, form: str, expected: set[str], names: list[str]) -> None:
    """Refuse a folder that holds samples of another source, another format, or no samples at all."""
    parts = FORMATS[form].parts + FORMATS[form].extras
    for name in names:
        if name in _OURS or is_unfinished(name):
            continue
        suffix = next((part for part in parts if name.endswith(part)), None)
        if suffix is None or name.removesuffix(suffix) not in expected:
            raise DataError(
                folder, f"holds {name}, which is no sample of the source as {form}", "choose another folder"
            )


def _journals(folder: Path) -> Iterator[Entry]:
    for name in list_folder(folder):
        if name.startswith(_JOURNAL):
            for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    yield Entry.from_json(json.loads(line))
                except (ValueError, TypeError, OverflowError):
                    continue  # Cut off when its writer was killed: the sample is made again.
