"""What is in a data folder: its samples and their format, by its manifest or by looking."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipelines.dataset.dataset import SampleDataset, dataset_from_shards
from pipelines.dataset.file_lists import DATA_LIST, LABEL_LIST, read_list
from pipelines.dataset.manifest import MANIFEST, Manifest
from pipelines.errors import MAX_CONSECUTIVE_BAD, AccessError, DataError
from pipelines.formats.npy import DATA_SUFFIX, LABEL_SUFFIX
from pipelines.formats.packed.format import PackedFormat, sample_members
from pipelines.formats.registry import FORMATS
from pipelines.formats.tfrecord import GZIP_MAGIC
from pipelines.sample import SPLITS, Sample, SampleSpec

_SUFFIXES = tuple(dict.fromkeys(format_name.suffix for format_name in FORMATS.values()))
_EXPECTED = " or ".join(f"*{suffix}" for suffix in _SUFFIXES)

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def split_dirs(root: Path) -> list[str]:
    """The folders of samples in `root`: those of SPLITS that are there, or without one of these ".".

    DataError where samples lie beside them, so that nobody could tell which are meant.
    """
    parts: list[str] = [split for split in SPLITS if (root / split).is_dir()]
    for name in list_folder(root) if parts else ():
        if name.endswith(_SUFFIXES):
            fault = f"holds {name} beside {' and '.join(parts)}"
            raise DataError(root, fault, "give one of these folders, or keep the sample elsewhere")
    return parts or ["."]


def open_split(root: Path, split: str) -> SampleDataset:
    """The samples in `root`/`split` ("train" or "validation"); see `open_folder`."""
    return open_folder(root / split)


def open_folder(folder: Path) -> SampleDataset:
    """The samples in `folder`: those of its manifest if it has one, else those that a look finds.

    Looking means listing the folder, in the order of `files_data.lst` if that is there, and reading
    the first sound sample for its shape. DataError where there is no folder, no sample, a mixture of
    formats, or lists that do not fit the files.
    """
    manifest = Manifest.load(folder)
    if manifest is not None:
        return _of_manifest(folder, manifest)
    names = list_folder(folder)
    kinds = {suffix: [name for name in names if name.endswith(suffix)] for suffix in _SUFFIXES}
    found = {suffix: tuple(kind) for suffix, kind in kinds.items() if kind}
    if not found:
        raise DataError(folder, "holds no samples", f"expected {_EXPECTED} files")
    if len(found) > 1:
        one, other, *_ = found.values()
        raise DataError(folder, f"holds {one[0]} and {other[0]}", "keep one format a folder")
    ((suffix, samples),) = found.items()
    if suffix == DATA_SUFFIX:
        _check_labels(folder, samples, names)
    ordered = _in_list_order(folder, samples, names)
    for name in ordered:
        if not name.isprintable():
            raise DataError(folder, f"holds {name!a}", "give it a name that lists can hold, in UTF-8")
    format_name = first_valid(ordered, lambda name: _detect_format(folder / name, suffix))
    if format_name == PackedFormat.name:
        split = dataset_from_shards(
            folder, ((name, sample_members(folder / name)) for name in ordered), SampleSpec(1)
        )
    else:
        split = SampleDataset(folder, format_name, ordered, SampleSpec(1))
    return replace(split, spec=_shape_of_first(split))


def first_valid(items: Iterable[_Item], probe: Callable[[_Item], _Found]) -> _Found:
    """What `probe` finds in the first sound one of some of `items`; the very first's DataError if none is."""
    faults: list[DataError] = []
    for item in islice(items, MAX_CONSECUTIVE_BAD):
        try:
            return probe(item)
        except DataError as error:
            faults.append(error)
    raise faults[0]


def list_folder(folder: Path) -> list[str]:
    """The names in `folder`, sorted; AccessError where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries)
    except OSError as error:
        raise AccessError(
            folder,
            f"cannot be listed ({error.strerror})",
            "give a folder of samples, or one that holds train and validation",
        ) from error


def read_sample(path: Path) -> Sample:
    """The sample in the file `path` of any format; DataError where it is none."""
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix):
            return FORMATS[_detect_format(path, suffix)].read(path)
    raise DataError(path, "has the name of no known format", f"expected {_EXPECTED}")


def detect_tfrecord_format(path: Path) -> str:
    """Which of the two TFRecord formats the file at `path` is in, by its first bytes."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(GZIP_MAGIC))
    except OSError as error:
        raise AccessError.reading(path, error) from error
    return "tfrecord_gzip" if magic == GZIP_MAGIC else "tfrecord"


def _detect_format(path: Path, suffix: str) -> str:
    """The format of the file at `path`, whose name ends with `suffix`."""
    forms = [format_name.name for format_name in FORMATS.values() if format_name.suffix == suffix]
    return forms[0] if len(forms) == 1 else detect_tfrecord_format(path)


def _of_manifest(folder: Path, manifest: Manifest) -> SampleDataset:
    if manifest.format_name not in FORMATS:
        raise DataError(
            folder / MANIFEST,
            f"names the format {manifest.format_name!r}",
            f"this program knows {', '.join(sorted(FORMATS))}",
        )
    if not manifest.entries:
        raise DataError(folder, "holds no samples", "its manifest is empty")
    if manifest.format_name == PackedFormat.name:
        shards = (
            (entry.name + part.suffix, part.members) for entry in manifest.entries for part in entry.files
        )
        return dataset_from_shards(folder, shards, manifest.spec)
    format_name = FORMATS[manifest.format_name]
    names = tuple(entry.name + format_name.suffix for entry in manifest.entries)
    sums = np.full((len(names), len(format_name.suffixes), 2), -1, np.int64)
    for row, entry in zip(sums, manifest.entries, strict=True):
        for part in entry.files:
            if part.suffix in format_name.suffixes:
                row[format_name.suffixes.index(part.suffix)] = part.bytes, part.crc32c
    return SampleDataset(folder, manifest.format_name, names, manifest.spec, checksums=sums)


def _shape_of_first(split: SampleDataset) -> SampleSpec:
    """The shape of the first sound sample; that others are not is for whoever reads them to say."""

    def shape(index: int) -> SampleSpec:
        size, _, _, channels = split.format.parse(split.path(index), split.read_files(index)).counts.shape
        return SampleSpec(size, channels)

    return first_valid(range(len(split)), shape)


def _check_labels(folder: Path, data: tuple[str, ...], names: list[str]) -> None:
    labels = {name.removesuffix(LABEL_SUFFIX) for name in names if name.endswith(LABEL_SUFFIX)}
    for name in data:
        if name.removesuffix(DATA_SUFFIX) not in labels:
            raise DataError(
                folder / name, "has no label file beside it", f"expected a *{LABEL_SUFFIX} of that name"
            )


def _in_list_order(folder: Path, found: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    """The samples `found` in the order of the folder's list files, if it has any."""
    if DATA_LIST not in names:
        return found
    listed = tuple(entry.name for entry in read_list(folder / DATA_LIST))
    missing = set(listed) - set(found)
    if missing:
        raise DataError(
            folder / DATA_LIST, f"lists {min(missing)}, which is not there", "write the list anew"
        )
    if not listed:
        raise DataError(folder / DATA_LIST, "lists nothing", "write the list anew")
    if LABEL_LIST in names:
        labels = tuple(entry.name for entry in read_list(folder / LABEL_LIST))
        if labels != tuple(name.removesuffix(DATA_SUFFIX) + LABEL_SUFFIX for name in listed):
            raise DataError(
                folder / LABEL_LIST, f"does not list the labels of {DATA_LIST} in its order", "write it anew"
            )
    return listed
