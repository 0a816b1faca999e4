"""Opening a folder of samples: by its manifest, or by listing it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipelines.dataset.dataset import EXTENT, SampleDataset
from pipelines.dataset.file_lists import DATA_LIST, LABEL_LIST, read_list
from pipelines.dataset.manifest import MANIFEST, Manifest
from pipelines.errors import MAX_CONSECUTIVE_BAD, DataError
from pipelines.filesystem import is_hidden
from pipelines.formats.npy import DATA_SUFFIX, LABEL_SUFFIX
from pipelines.formats.packed.format import PackedFormat, sample_members
from pipelines.formats.registry import FORMATS
from pipelines.formats.tfrecord import GZIP_MAGIC, TFRECORD_SUFFIX
from pipelines.io import TarMember
from pipelines.sample import ALL_SPLITS, SampleSpec
from pipelines.storage.local import clear_open_files
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of

SAMPLE_SUFFIXES = tuple(dict.fromkeys(format_.suffix for format_ in FORMATS.values()))
"""Suffixes of files that hold samples."""

_EXPECTED = " or ".join(f"*{suffix}" for suffix in SAMPLE_SUFFIXES)

_UNKNOWN_SPEC = SampleSpec(1)

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def split_dirs(root: Location) -> list[str]:
    """Return the folders of samples in `root`: those of ALL_SPLITS that exist, or ["."] if there are none.

    Raises:
        AccessError: `root` cannot be listed or searched.
        DataError: samples lie beside the splits, so that it is unclear which are meant.
    """
    found: list[str] = [split for split in ALL_SPLITS if has_split(root, split)]
    for name in list_folder(root) if found and storage_of(root).lists_folders else ():
        if name.endswith(SAMPLE_SUFFIXES) and not is_hidden(name):
            fault = f"holds {name} beside {' and '.join(found)}"
            raise DataError(root, fault, "give one of these folders, or keep the sample elsewhere")
    return found or ["."]


def has_split(root: Location, split: str) -> bool:
    """Return whether there is a folder `split` in `root`, or a link of this name that leads nowhere.

    Raises:
        UnreadableError: `root` cannot be searched.
    """
    storage = storage_of(root)
    return storage.is_present(root / split if storage.lists_folders else root / split / MANIFEST)


def open_folder(folder: Location, *, labeled: bool = True) -> SampleDataset:
    """Open the samples in `folder`, those of its manifest if it has one.

    Without a manifest the folder is listed, in the order of `files_data.lst` if that exists, and the
    first valid sample is read for its shape. Hidden files are no samples; see `is_hidden`.

    Args:
        labeled: False if the counts alone are needed; see `Format.parse`.

    Raises:
        DataError: there is no folder, no sample or a mixture of formats, or the lists do not match the files.
    """
    manifest = Manifest.load(folder)
    clear_open_files()
    if manifest is not None:
        return replace(_from_manifest(folder, manifest), labeled=labeled, version=manifest.digest)
    names = list_folder(folder)
    named = [name for name in names if name.endswith(SAMPLE_SUFFIXES)]
    found = [name for name in named if not is_hidden(name)]
    if not found:
        hidden = f" but {named[0]}, and names that begin with a dot are skipped" if named else ""
        raise DataError(folder, f"holds no samples{hidden}", f"expected {_EXPECTED} files")
    labels = {name for name in names if name.endswith(LABEL_SUFFIX)}
    suffix = next(filter(found[0].endswith, SAMPLE_SUFFIXES))
    for name in found:
        if not name.endswith(suffix):
            raise DataError(folder, f"holds {found[0]} and {name}", "keep one format a folder")
        if labeled and suffix == DATA_SUFFIX and name.removesuffix(suffix) + LABEL_SUFFIX not in labels:
            raise DataError(folder / name, "has no label file", f"expected a *{LABEL_SUFFIX} of that name")
    ordered = _in_list_order(folder, found, names if labeled else set(names) - {LABEL_LIST})
    for name in ordered:
        if not name.isprintable():
            raise DataError(folder, f"holds {name!a}", "give it a name that lists can hold, in UTF-8")
    format_name = first_valid(ordered, lambda name: _detect_format(folder / name))
    return _from_files(folder, format_name, ordered, labeled)


def open_path(path: Location, *, labeled: bool = True) -> list[SampleDataset]:
    """Open the samples at `path`: a file of one, a shard, a folder of samples, or the splits of a data set.

    Args:
        labeled: See `open_folder`.

    Raises:
        DataError: There is no sample, or its file is damaged or of no known format.
    """
    # Objects have no folders that could be asked for.
    is_folder = path.is_dir() if isinstance(path, Path) else not path.name.endswith(SAMPLE_SUFFIXES)
    if is_folder:
        return [open_folder(path / split, labeled=labeled) for split in split_dirs(path)]
    return [_from_files(path.parent, _detect_format(path), [path.name], labeled)]


def first_valid(items: Iterable[_Item], probe: Callable[[_Item], _Found]) -> _Found:
    """Return `probe(item)` for the first of up to 16 items that does not raise DataError.

    If all fail, raise the first error.
    """
    errors: list[DataError] = []
    for item in islice(items, MAX_CONSECUTIVE_BAD):
        try:
            return probe(item)
        except DataError as error:
            errors.append(error)
    raise errors[0]


def list_folder(folder: Location) -> list[str]:
    """Return the names in `folder`, sorted; UnreadableError if it cannot be listed."""
    return storage_of(folder).list(folder)


def _detect_format(path: Location) -> str:
    """Return the name of the format of `path`, by its suffix and, of a TFRecord, its first bytes."""
    if path.name.endswith(TFRECORD_SUFFIX):
        start = storage_of(path).read_range(path, 0, len(GZIP_MAGIC))
        return "tfrecord_gzip" if start == GZIP_MAGIC else "tfrecord"
    for name, format_ in FORMATS.items():
        if path.name.endswith(format_.suffix):
            return name
    raise DataError(path, "has the name of no known format", f"expected {_EXPECTED}")


def _from_files(folder: Location, format_name: str, names: Sequence[str], labeled: bool) -> SampleDataset:
    """Return the samples in the files `names`; their shape is that of the first valid one."""
    if format_name == PackedFormat.name:
        shards = ((name, sample_members(folder / name)) for name in names)
        dataset = replace(dataset_from_shards(folder, shards, _UNKNOWN_SPEC), labeled=labeled)
    else:
        storage = storage_of(folder)
        dataset = SampleDataset(
            folder, format_name, tuple(names), _UNKNOWN_SPEC, labeled=labeled, storage=storage
        )
    parse = partial(dataset.format.parse, labeled=labeled)

    def shape_of(index: int) -> tuple[int, ...]:
        return parse(dataset.path(index), dataset.read_contents(index)).counts.shape

    size, *_, channels = first_valid(range(len(dataset)), shape_of)
    return replace(dataset, spec=SampleSpec(size, channels))


def _from_manifest(folder: Location, manifest: Manifest) -> SampleDataset:
    """Return the samples that `manifest` lists in `folder`.

    Raises:
        DataError: the manifest names an unknown format or no sample, or two samples have the same id.
    """
    if manifest.format_name not in FORMATS:
        fault = f"names the format {manifest.format_name}"
        raise DataError(folder / MANIFEST, fault, f"known formats: {', '.join(sorted(FORMATS))}")
    if not manifest.entries:
        raise DataError(folder, "holds no samples", "its manifest is empty")
    if manifest.format_name == PackedFormat.name:
        files = ((entry.name + file.suffix, file) for entry in manifest.entries for file in entry.files)
        return dataset_from_shards(folder, ((name, file.members) for name, file in files), manifest.spec)
    format_ = FORMATS[manifest.format_name]
    names = tuple(entry.name + format_.suffix for entry in manifest.entries)
    extents = np.full((len(names), len(format_.suffixes)), -1, EXTENT)
    for row, entry in zip(extents, manifest.entries, strict=True):
        for file in entry.files:
            if file.suffix in format_.suffixes:
                row[format_.suffixes.index(file.suffix)] = 0, file.bytes, file.crc32c
    return SampleDataset(
        folder, manifest.format_name, names, manifest.spec, extents, storage=storage_of(folder)
    )


def _in_list_order(folder: Location, found: Sequence[str], names: Collection[str]) -> Sequence[str]:
    """Return the samples `found` in the order of the folder's list files, if `names` has any."""
    if DATA_LIST not in names:
        return found
    path, remedy = folder / DATA_LIST, "regenerate the list"
    listed = [file.name for file in read_list(path)]
    if missing := set(listed) - set(found):
        name, fault = min(missing), "does not exist"
        bases = (folder, folder.absolute().parent) if isinstance(folder, Path) else ()
        if any(os.path.lexists(base / name) for base in bases):
            fault = "is in another folder" if "/" in name else f"is not one of the {_EXPECTED} files here"
        raise DataError(path, f"lists {name}, which {fault}", remedy)
    if not listed:
        raise DataError(path, "lists no sample (names that begin with a dot are skipped)", remedy)
    if LABEL_LIST in names:
        labels = [file.name for file in read_list(folder / LABEL_LIST)]
        if labels != [name.removesuffix(DATA_SUFFIX) + LABEL_SUFFIX for name in listed]:
            fault = f"does not list the labels of {DATA_LIST} in its order"
            raise DataError(folder / LABEL_LIST, fault, remedy)
    return listed


def dataset_from_shards(
    folder: Location, shards: Iterable[tuple[str, Sequence[TarMember]]], spec: SampleSpec
) -> SampleDataset:
    """Return the packed samples of `spec` in `folder`, given each shard's name and members.

    Raises:
        DataError: two samples have the same id.
    """
    clear_open_files()
    members = [(f"{shard}/{member.name}", member) for shard, members in shards for member in members]
    first: dict[str, str] = {}
    for name, member in members:
        sample_id = member.name.rpartition("/")[2]
        if sample_id in first:
            raise DataError(folder / name, f"has the same name as {first[sample_id]}", "keep one of them")
        first[sample_id] = name
    extents = np.array([(member.offset, member.bytes, -1) for _, member in members], EXTENT)[:, None]
    names = tuple(name for name, _ in members)
    return SampleDataset(folder, PackedFormat.name, names, spec, extents, storage=storage_of(folder))
