"""The task of converting samples from a format to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.dataset.dataset import EXTENT, SampleDataset
from pipelines.dataset.manifest import SourceFingerprint
from pipelines.errors import DataError, UnreadableError
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import SHARD_SUFFIX, write_shard
from pipelines.formats.registry import FORMATS
from pipelines.io import WrittenFile
from pipelines.sample import SampleSpec
from preprocess.conversion.task_result import DamagedError, make_entries

Line = tuple[str, Sequence[Sequence[int]]]
"""A sample of the source: its name, and its extents, empty where they are not known."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """From the format `format_name` in the folder `source` to the format `to` in the folder `target`.

    size, channels: of the samples' shape, (size, size, size, channels).
    sharded: whether the samples of a job become one shard, or each a file of its own.
    """

    source: str
    format_name: str
    size: int
    channels: int
    target: str
    to: str
    sharded: bool

    def __call__(self, job: tuple[Sequence[Line], Sequence[tuple[str, Any]]]) -> dict[str, Any]:
        """Convert the samples job[0]; see `make_entries` for job[1] and the answer."""
        lines, wanted = job
        split, target = self._split(lines), Path(self.target)

        def samples() -> Iterator[tuple[str, Sequence[WrittenFile]]]:
            for index in range(len(split)):
                stem = split.sample_id(index)
                yield stem, FORMATS[self.to].write(target, stem, split.read(index, verify=True))

        def shard() -> Iterator[tuple[str, Sequence[WrittenFile]]]:
            ((stem, _),) = wanted
            yield stem, write_shard(target / (stem + SHARD_SUFFIX), _members(split))

        files = dict.fromkeys(path for index in range(len(split)) for path in split.files(index))
        make = shard if self.sharded else samples
        members = (
            [split.sample_id(index) + MEMBER_SUFFIX for index in range(len(split))] if self.sharded else ()
        )
        return make_entries(
            target, lambda: SourceFingerprint.from_files(split.names, files), wanted, make, members
        )

    def _split(self, lines: Sequence[Line]) -> SampleDataset:
        names, rows = zip(*lines, strict=True)
        extents = np.array([[tuple(extent) for extent in row] for row in rows], EXTENT) if any(rows) else None
        spec = SampleSpec(self.size, self.channels)
        return SampleDataset(Path(self.source), self.format_name, names, spec, extents)


def lines_of(split: SampleDataset) -> list[Line]:
    """The samples of `split` as a Conversion is told of them."""
    extents = split.extents.tolist() if split.extents is not None else [()] * len(split)
    return list(zip(split.names, extents, strict=True))


def _members(split: SampleDataset) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The members of a shard of all of `split`; DamagedError after the last one if some are damaged."""
    faults: list[str] = []
    lost: list[str] = []
    unread: dict[str, str] = {}
    sound = False
    for index in range(len(split)):
        try:
            sample = split.read(index, verify=True)
        except DataError as error:
            if isinstance(error, UnreadableError):
                lost.append(str(error))
                unread[error.path] = error.fault
            else:
                faults.append(str(error))
        else:
            sound = True
            yield split.sample_id(index) + MEMBER_SUFFIX, encode(sample)
    if faults or lost:
        raise DamagedError(faults, lost, {} if sound or faults else unread)
