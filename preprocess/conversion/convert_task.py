"""The task of converting samples from one format to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from preprocess.conversion.task_result import DamagedSourceError, TaskResult, WorkItem, convert_if_stale


class SampleLocation(NamedTuple):
    """A sample of the source, small enough to send half a million of them to other ranks.

    name: As in `SampleDataset.names`.
    extents: Its row of `SampleDataset.extents`; empty without these.
    """

    name: str
    extents: Sequence[Sequence[int]]

    @staticmethod
    def list_all(dataset: SampleDataset) -> list[SampleLocation]:
        """Return the locations of all samples of `dataset`."""
        extents = [()] * len(dataset) if dataset.extents is None else dataset.extents.tolist()
        return list(map(SampleLocation, dataset.names, extents))


@dataclass(frozen=True, slots=True)
class ConvertTask:
    """Convert samples of `spec` in the format `source_format` in `source` to `target_format` in `target`.

    The source of a work item is a sequence of SampleLocation: a sample, or with `sharded` those of a shard.
    """

    source: Path
    source_format: str
    spec: SampleSpec
    target: Path
    target_format: str
    sharded: bool

    def __call__(self, item: WorkItem) -> TaskResult:
        """Convert the samples of `item` unless their entries are up to date."""
        dataset = self._dataset(item.source)
        files = dict.fromkeys(path for index in range(len(dataset)) for path in dataset.files(index))

        def convert() -> Iterator[tuple[str, Sequence[WrittenFile]]]:
            if self.sharded:
                (name,) = item.entries
                yield name, write_shard(self.target / (name + SHARD_SUFFIX), _members(dataset))
            else:
                for index, name in enumerate(item.entries):
                    sample = dataset.read(index, verify=True)
                    yield name, FORMATS[self.target_format].write(self.target, name, sample)

        return convert_if_stale(
            item, self.target, lambda: SourceFingerprint.from_files(dataset.names, files), convert
        )

    def _dataset(self, samples: Sequence[SampleLocation]) -> SampleDataset:
        names, rows = zip(*samples, strict=True)
        extents = np.array([[tuple(extent) for extent in row] for row in rows], EXTENT) if any(rows) else None
        return SampleDataset(self.source, self.source_format, names, self.spec, extents)


def _members(dataset: SampleDataset) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the members of a shard of all samples of `dataset`.

    Raises:
        DamagedSourceError: After the last sample, if some are damaged or cannot be read.
    """
    faults: list[str] = []
    unreadable: dict[str, str] = {}
    readable = False
    for index in range(len(dataset)):
        try:
            sample = dataset.read(index, verify=True)
        except DataError as error:
            faults.append(str(error))
            if isinstance(error, UnreadableError):
                unreadable[error.path] = error.fault
            else:
                readable = True
        else:
            readable = True
            yield dataset.sample_id(index) + MEMBER_SUFFIX, encode(sample)
    if faults:
        raise DamagedSourceError(faults, {} if readable else unreadable)
