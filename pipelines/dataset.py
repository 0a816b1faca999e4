"""What is in a data folder: its samples in order, and the format they are in, found by looking."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import crc32c
import numpy as np
import numpy.typing as npt

from pipelines.errors import AccessError, DataError
from pipelines.files import Member, read_file
from pipelines.formats import FORMATS, CountsPayload, Format, Payload
from pipelines.formats.npy import DATA, LABEL
from pipelines.formats.packed import MEMBER, PackedFormat, member_stem, payload_of, sample_members
from pipelines.formats.tfrecord import GZIP_MAGIC
from pipelines.lists import DATA_LIST, LABEL_LIST, read_list
from pipelines.manifest import MANIFEST, Manifest
from pipelines.plan import Indices
from pipelines.sample import Sample, SampleSpec
from pipelines.shards import forget, read_member

SPLITS = ("train", "validation")
"""The folders of a data set."""

_SUFFIXES = tuple(dict.fromkeys(form.suffix for form in FORMATS.values()))
_EXPECTED = " or ".join(f"*{suffix}" for suffix in _SUFFIXES)

_CHANGED = (
    f"fetch or convert it again, or if it was changed on purpose, remove {MANIFEST} and write it anew with "
    "python -m preprocess.verify --write"
)

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")

_LOOKED_AT = 16
"""Files or samples tried before a folder is taken to hold none that is sound."""


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One of `count` shares of a split of `total` samples, as equal as can be.

    places: the positions in the whole of this one's samples, int64.
    seed: what drew the shares; None where each has every `count`-th sample.
    """

    places: Indices
    count: int
    total: int
    seed: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Extents:
    """Where samples lie in their shards: the first byte of each, and how many they are, int64."""

    offsets: Indices
    lengths: Indices


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The samples of one folder, in the order of its manifest, its list file or their names.

    root: the folder.
    form: the name of their format, a key of FORMATS.
    names: the files that hold the counts, one a sample; `<shard>/<member>` of those in shards.
    spec: the shape of every sample.
    extents: where in their shards they lie; None for samples in files of their own.
    share: where its samples stand in a whole of which this is a share; None for the whole itself.
    sums: what the folder's manifest says of the files that `files` gives, (samples, files, 2) int64: the
        length in bytes and the CRC-32C of each, both -1 where it does not say. None for samples in shards,
        which have CRCs of their own, and without a manifest.
    """

    root: Path
    form: str
    names: tuple[str, ...]
    spec: SampleSpec
    extents: Extents | None = None
    share: Share | None = None
    sums: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def format(self) -> Format:
        """The format itself."""
        return FORMATS[self.form]

    @property
    def total(self) -> int:
        """How many samples the whole has."""
        return self.share.total if self.share else len(self)

    @property
    def shares(self) -> int:
        """Into how many shares the whole has been divided."""
        return self.share.count if self.share else 1

    @property
    def division(self) -> str:
        """How the whole has been divided, in words that are equal for equal shares."""
        drawn = f" drawn with seed {self.share.seed}" if self.share and self.share.seed is not None else ""
        return f"{self.shares} shares{drawn}" if self.shares > 1 else "one share"

    def places(self, index: Indices) -> Indices:
        """Where the samples `index` stand in the whole."""
        return self.share.places[index] if self.share else index

    def path(self, index: int) -> Path:
        """The file that holds the counts of sample `index`, or its name in its shard."""
        return self.root / self.names[index]

    def stem(self, index: int) -> str:
        """The name of sample `index`, whatever the format."""
        name = self.names[index]
        return member_stem(name) if self.extents else name.removesuffix(self.format.suffix)

    @property
    def units(self) -> list[str]:
        """The stems of its samples' files, or of its shards, in order."""
        if not self.extents:
            return [self.stem(index) for index in range(len(self))]
        shards = dict.fromkeys(name.partition("/")[0] for name in self.names)
        return [shard.removesuffix(self.format.suffix) for shard in shards]

    def files(self, index: int) -> tuple[Path, ...]:
        """The files that reading sample `index` needs."""
        if self.extents:
            return (self._place(index)[0],)
        stem = self.stem(index)
        return tuple(self.root / (stem + part) for part in self.format.parts)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What `contents` has of each sample."""
        return (MEMBER,) if self.extents else self.format.parts

    def contents(self, index: int, *, direct: bool = False) -> dict[str, bytes]:
        """The bytes of sample `index` as `Format.parse` takes them; `direct` reads past the page cache."""
        if not self.extents:
            files = zip(self.kinds, self.files(index), strict=True)
            return {kind: read_file(path, direct=direct) for kind, path in files}
        extent = int(self.extents.offsets[index]), int(self.extents.lengths[index])
        return {MEMBER: read_member(*self._place(index), *extent, direct=direct)}

    def _place(self, index: int) -> tuple[Path, str]:
        """The shard that holds sample `index`, and its name there, which may lead through folders."""
        shard, _, member = self.names[index].partition("/")
        return self.root / shard, member

    def vouched(self, index: int, *, direct: bool = False) -> dict[str, bytes]:
        """`contents`, compared with what the manifest says, if there is one; DataError names any fault.

        For whoever makes other files of them: a format without checksums would have damage pass for sound.
        """
        contents = self.contents(index, direct=direct)
        if self.sums is not None:
            told = self.sums[index].tolist()
            for path, content, (length, crc) in zip(self.files(index), contents.values(), told, strict=True):
                if length >= 0 and len(content) != length:
                    fault = f"has {len(content)} bytes where {MANIFEST} says {length}"
                    raise DataError(path, fault, _CHANGED)
                if length >= 0 and crc32c.crc32c(content) != crc:
                    raise DataError(path, f"its CRC-32C is not that in {MANIFEST}", _CHANGED)
        return contents

    def read(self, index: int) -> Sample:
        """Sample `index`, read and checked on the host; DataError names any fault."""
        return self.format.parse(self.path(index), self.contents(index), self.spec)

    def payload(self, index: int, *, whole: bool = False, direct: bool = False) -> Payload:
        """Sample `index` for the pipeline; see `Format.payload`, and `contents` for `direct`."""
        path = self.path(index)
        if self.extents:
            content = self.contents(index, direct=direct)[MEMBER]
            return payload_of(path, content, self.spec, whole=whole)
        if direct:
            sample = self.format.parse(path, self.contents(index, direct=True), self.spec)
            return CountsPayload(sample.counts, sample.target)
        return self.format.payload(path, self.spec, whole=whole)

    def take(self, index: Indices, share: Share | None = None) -> Split:
        """The samples `index` alone; `share` says if they are one."""
        names = tuple(self.names[i] for i in index.tolist())
        extents = self.extents and Extents(self.extents.offsets[index], self.extents.lengths[index])
        sums = None if self.sums is None else self.sums[index]
        return replace(self, names=names, extents=extents, share=share, sums=sums)


def open_split(root: Path, split: str) -> Split:
    """The samples in `root`/`split` ("train" or "validation"); see `open_folder`."""
    return open_folder(root / split)


def open_folder(folder: Path) -> Split:
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
    if suffix == DATA:
        _check_labels(folder, samples, names)
    ordered = _listed(folder, samples, names)
    for name in ordered:
        if not name.isprintable():
            raise DataError(folder, f"holds {name!a}", "give it a name that lists can hold, in UTF-8")
    form = first_sound(ordered, lambda name: _form_of(folder / name, suffix))
    if form == PackedFormat.name:
        split = of_shards(folder, ((name, sample_members(folder / name)) for name in ordered), SampleSpec(1))
    else:
        split = Split(folder, form, ordered, SampleSpec(1))
    return replace(split, spec=_shape_of_first(split))


def first_sound(items: Iterable[_Item], look: Callable[[_Item], _Found]) -> _Found:
    """What `look` finds in the first sound one of some of `items`; the very first's DataError if none is."""
    faults: list[DataError] = []
    for item in islice(items, _LOOKED_AT):
        try:
            return look(item)
        except DataError as error:
            faults.append(error)
    raise faults[0]


def of_shards(folder: Path, shards: Iterable[tuple[str, Sequence[Member]]], spec: SampleSpec) -> Split:
    """The samples of `spec` in the `shards` of `folder`, each with its members.

    DataError where two have the same name.
    """
    forget()
    found = [(f"{name}/{member.name}", member) for name, members in shards for member in members]
    first: dict[str, str] = {}
    for name, member in found:
        stem = member.name.rpartition("/")[2]
        if stem in first:
            raise DataError(folder / name, f"has the same name as {first[stem]}", "keep one of them")
        first[stem] = name
    places = np.array([member[1:] for _, member in found], np.int64).reshape(-1, 2)
    extents = Extents(places[:, 0], places[:, 1])
    return Split(folder, PackedFormat.name, tuple(name for name, _ in found), spec, extents)


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
            return FORMATS[_form_of(path, suffix)].read(path)
    raise DataError(path, "has the name of no known format", f"expected {_EXPECTED}")


def tfrecord_form(path: Path) -> str:
    """Which of the two TFRecord formats the file at `path` is in, by its first bytes."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(GZIP_MAGIC))
    except OSError as error:
        raise AccessError.reading(path, error) from error
    return "tfrecord_gzip" if magic == GZIP_MAGIC else "tfrecord"


def _form_of(path: Path, suffix: str) -> str:
    """The format of the file at `path`, whose name ends with `suffix`."""
    forms = [form.name for form in FORMATS.values() if form.suffix == suffix]
    return forms[0] if len(forms) == 1 else tfrecord_form(path)


def _of_manifest(folder: Path, manifest: Manifest) -> Split:
    if manifest.form not in FORMATS:
        raise DataError(
            folder / MANIFEST,
            f"names the format {manifest.form!r}",
            f"this program knows {', '.join(sorted(FORMATS))}",
        )
    if not manifest.entries:
        raise DataError(folder, "holds no samples", "its manifest is empty")
    if manifest.form == PackedFormat.name:
        shards = (
            (entry.stem + part.suffix, part.members) for entry in manifest.entries for part in entry.parts
        )
        return of_shards(folder, shards, manifest.spec)
    form = FORMATS[manifest.form]
    names = tuple(entry.stem + form.suffix for entry in manifest.entries)
    sums = np.full((len(names), len(form.parts), 2), -1, np.int64)
    for row, entry in zip(sums, manifest.entries, strict=True):
        for part in entry.parts:
            if part.suffix in form.parts:
                row[form.parts.index(part.suffix)] = part.bytes, part.crc32c
    return Split(folder, manifest.form, names, manifest.spec, sums=sums)


def _shape_of_first(split: Split) -> SampleSpec:
    """The shape of the first sound sample; that others are not is for whoever reads them to say."""

    def shape(index: int) -> SampleSpec:
        size, _, _, channels = split.format.parse(split.path(index), split.contents(index)).counts.shape
        return SampleSpec(size, channels)

    return first_sound(range(len(split)), shape)


def _check_labels(folder: Path, data: tuple[str, ...], names: list[str]) -> None:
    labels = {name.removesuffix(LABEL) for name in names if name.endswith(LABEL)}
    for name in data:
        if name.removesuffix(DATA) not in labels:
            raise DataError(folder / name, "has no label file beside it", f"expected a *{LABEL} of that name")


def _listed(folder: Path, found: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
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
        if labels != tuple(name.removesuffix(DATA) + LABEL for name in listed):
            raise DataError(
                folder / LABEL_LIST, f"does not list the labels of {DATA_LIST} in its order", "write it anew"
            )
    return listed
