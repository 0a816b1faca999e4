"""The folder that a conversion fills: opened for one job alone, and committed when it is complete.

No function here removes a file of a sample except `remove_files`, which is for caches.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipelines.dataset.file_lists import DATA_LIST, LABEL_LIST, ListedFile, write_list
from pipelines.dataset.manifest import MANIFEST, Entry, Manifest
from pipelines.errors import AccessError, DataError, MissingError, writing
from pipelines.filesystem import is_hidden
from pipelines.formats.npy import DATA_SUFFIX, LABEL_SUFFIX
from pipelines.formats.registry import FORMATS
from pipelines.io import final_name, remove_temporaries
from pipelines.sample import SampleSpec
from pipelines.storage.location import Location
from pipelines.storage.parallel import map_ahead
from pipelines.storage.select import storage_of
from preprocess.conversion.journal import is_journal, load_records, names_in, write_journal

_REMEDY = "convert into a new folder, or remove this one"


def check_folder(
    folder: Location,
    format_name: str,
    spec: SampleSpec,
    entries: Collection[str],
    samples: Collection[str],
    samples_per_shard: int | None,
) -> dict[str, Entry]:
    """Check that `folder` belongs to a conversion, and change nothing; return all records by name of entry.

    No other process may write into it. Samples that were added to the source since
    an earlier run are accepted.

    Args:
        folder: The target folder.
        format_name: Format of the entries, a key of FORMATS.
        spec: Shape of the samples.
        entries: Names of all entries that the conversion makes.
        samples: IDs of all samples of the source.
        samples_per_shard: Samples of each shard but the last; None without shards.

    Raises:
        DataError: The folder belongs to a conversion with other settings, or to one of a source with samples
            that this source does not have; or it holds a file that no conversion recorded.
    """
    state = load_records(folder, format_name, spec)
    # A single shard may have been cut off by the end of the source; it shows a lower bound.
    largest = max((len(entry.members) for entry in state.entries.values()), default=0)
    recorded = state.samples_per_shard or max(largest, samples_per_shard or 0)
    if recorded != (samples_per_shard or 0):
        fault = f"holds shards of {recorded} samples, not {samples_per_shard}"
        raise DataError(folder, fault, _REMEDY)
    if missing := state.samples.difference(samples):
        fault = f"is of a source with {min(missing)}, which this source does not have"
        remedy = "restore it in the source, convert into a new folder, or remove this one"
        raise DataError(folder, f"{fault} ({len(missing)} missing samples in all)", remedy)
    for name, files in files_by_entry(folder, format_name).items():
        if name not in entries:
            raise DataError(folder, f"holds {files[0]}, which is not of this conversion", _REMEDY)
        if not (state.entries or state.samples):
            fault = f"holds {files[0]}, but no manifest or journal of the conversion that made it"
            raise DataError(folder, fault, _REMEDY)
    return state.entries


def reopen(
    folder: Location, format_name: str, spec: SampleSpec, entries: Iterable[Entry], **settings: Any
) -> Location:
    """Replace manifest, lists and journals by one journal with `entries`, whose path is returned.

    Temporary files are removed.
    """
    if isinstance(folder, Path):
        with writing(folder):
            remove_temporaries(folder)
    journal = write_journal(folder, format_name, spec, entries, run=secrets.token_hex(8), **settings)
    _remove(folder, (name for name in names_in(folder) if _is_record(name) and name != journal.name))
    # For `check_not_replaced`.
    storage_of(journal).state(journal)
    return journal


def check_not_replaced(journal: Location) -> None:
    """Raise DataError if another conversion has begun since `reopen` has written `journal`.

    In a folder of an object store another machine cannot be kept from it.
    """
    try:
        storage_of(journal).read(journal)
    except (MissingError, DataError) as error:
        if isinstance(error, AccessError) and not isinstance(error, MissingError):
            raise
        fault = "another conversion into it has begun meanwhile, on another machine"
        raise DataError(journal.parent, fault, "wait until it has finished") from error


def remove_files(folder: Path, format_name: str, names: Iterable[str]) -> None:
    """Remove the files of the entries `names` from a folder that is a cache."""
    with writing(folder):
        for name in names:
            for suffix in FORMATS[format_name].written_suffixes:
                (folder / (name + suffix)).unlink(missing_ok=True)


def commit(folder: Location, format_name: str, spec: SampleSpec, entries: Sequence[Entry]) -> None:
    """Write the list files and the manifest of `entries`, then remove the journals."""
    sizes = {entry.name + file.suffix: file.bytes for entry in entries for file in entry.files}
    for name, files in list_files(format_name, [entry.name for entry in entries]).items():
        # Staging of compressed files needs their lengths beforehand.
        sized = format_name == "tfrecord_gzip"
        write_list(folder / name, (ListedFile(file, sizes[file] if sized else None) for file in files))
    Manifest(format_name, spec, tuple(entries)).save(folder)
    _remove(folder, filter(is_journal, names_in(folder)))


def list_files(format_name: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the list files that go with the entries `names`, and the file names in each."""
    lists = (
        {LABEL_LIST: LABEL_SUFFIX, DATA_LIST: DATA_SUFFIX}
        if format_name == "npy"
        else {DATA_LIST: FORMATS[format_name].suffix}
    )
    return {name: [entry + suffix for entry in names] for name, suffix in lists.items()}


def files_by_entry(folder: Location, format_name: str) -> dict[str, list[str]]:
    """Return the files in `folder` by the name of their entry, without records, locks and other hidden files.

    A file that is not of `format_name` stands under its own name.
    """
    found: dict[str, list[str]] = defaultdict(list)
    suffixes = FORMATS[format_name].written_suffixes
    for name in names_in(folder):
        # A temporary file of another program is hidden too, but `reopen` would remove it.
        final = final_name(name)
        foreign = final is not None and not (_is_record(final) or final.endswith(suffixes))
        if foreign or not (is_hidden(name) or _is_record(name)):
            suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), "")
            found[name.removesuffix(suffix)].append(name)
    return found


def is_unfinished(name: str) -> bool:
    """Return whether `name` is that of a file which only a killed writer leaves."""
    return is_journal(name) or final_name(name) is not None


def _remove(folder: Location, names: Iterable[str]) -> None:
    for _ in map_ahead(storage_of(folder).remove, (folder / name for name in names)):
        pass


def _is_record(name: str) -> bool:
    return name in (MANIFEST, DATA_LIST, LABEL_LIST) or is_journal(name)
