"""What is in a data folder: its samples in order, and the format they are in, found by looking."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import DataError
from pipelines.files import read_file
from pipelines.formats import FORMATS, Format
from pipelines.formats.npy import DATA, LABEL
from pipelines.formats.tfrecord import GZIP_MAGIC
from pipelines.sample import Sample, SampleSpec

_LISTS = {DATA: "files_data.lst", LABEL: "files_label.lst"}


@dataclass(frozen=True, slots=True)
class Split:
    """The samples of one folder, in the order of their names or of its list file.

    root: the folder.
    form: the name of their format, a key of FORMATS.
    names: the files that hold the counts, one a sample.
    spec: the shape of every sample.
    """

    root: Path
    form: str
    names: tuple[str, ...]
    spec: SampleSpec

    def __len__(self) -> int:
        return len(self.names)

    @property
    def format(self) -> Format:
        """The format itself."""
        return FORMATS[self.form]

    def path(self, index: int) -> Path:
        """The file that holds the counts of sample `index`."""
        return self.root / self.names[index]

    def stem(self, index: int) -> str:
        """The name of sample `index`, whatever the format."""
        return self.names[index].removesuffix(self.format.suffix)

    def read(self, index: int) -> Sample:
        """Sample `index`, read and checked on the host; DataError names any fault."""
        return self.format.read(self.path(index), self.spec)


def open_split(root: Path, split: str) -> Split:
    """The samples in `root`/`split` ("train" or "validation").

    The first sample is read, for its shape. DataError where there is no folder, no sample, a
    mixture of formats, or lists that do not fit the files.
    """
    folder = root / split
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(
            folder,
            f"cannot be listed ({error.strerror})",
            "give a folder that holds train and validation",
        ) from error
    records = tuple(name for name in names if name.endswith(".tfrecord"))
    data = tuple(name for name in names if name.endswith(DATA))
    if records and data:
        raise DataError(folder, f"holds {records[0]} and {data[0]}", "keep one format a folder")
    if data:
        return _checked(folder, "npy", _listed(folder, data, names))
    if records:
        return _checked(folder, _tfrecord_form(folder / records[0]), records)
    raise DataError(folder, "holds no samples", f"expected *.tfrecord or *{DATA} files")


def read_sample(path: Path) -> Sample:
    """The sample in the file `path` of any format; DataError where it is none."""
    if path.name.endswith(DATA):
        return FORMATS["npy"].read(path)
    if path.name.endswith(".tfrecord"):
        return FORMATS[_tfrecord_form(path)].read(path)
    raise DataError(path, "has the name of no known format", f"expected *.tfrecord or *{DATA}")


def _tfrecord_form(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            magic = file.read(len(GZIP_MAGIC))
    except OSError as error:
        raise DataError(
            path, f"cannot be read ({error.strerror})", "check the path and its rights"
        ) from error
    return "tfrecord_gzip" if magic == GZIP_MAGIC else "tfrecord"


def _checked(folder: Path, form: str, names: tuple[str, ...]) -> Split:
    first = FORMATS[form].read(folder / names[0])
    size, _, _, channels = first.counts.shape
    return Split(folder, form, names, SampleSpec(size, channels))


def _listed(folder: Path, data: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    """The data files in the order of the list files, if there are any, each with its label."""
    labels = {name.removesuffix(LABEL) for name in names if name.endswith(LABEL)}
    for name in data:
        if name.removesuffix(DATA) not in labels:
            raise DataError(folder / name, "has no label file beside it", f"expected a *{LABEL} of that name")
    if _LISTS[DATA] not in names:
        return data
    listed = _list(folder / _LISTS[DATA])
    missing = set(listed) - set(data)
    if missing or len(set(listed)) != len(listed):
        which = f"lists {min(missing)}, which is not there" if missing else "lists a file twice"
        raise DataError(folder / _LISTS[DATA], which, "write the list anew")
    if _LISTS[LABEL] in names:
        expected = tuple(name.removesuffix(DATA) + LABEL for name in listed)
        if _list(folder / _LISTS[LABEL]) != expected:
            raise DataError(
                folder / _LISTS[LABEL],
                f"does not list the labels of {_LISTS[DATA]} in its order",
                "write it anew",
            )
    return listed


def _list(path: Path) -> tuple[str, ...]:
    lines = read_file(path).decode(errors="replace").split("\n")
    return tuple(line.strip() for line in lines if line.strip())
