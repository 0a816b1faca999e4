"""The task of converting samples from one format to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.manifest import SourceFingerprint
from pipelines.errors import DataError
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.format import MEMBER_SUFFIX, PackedFormat
from pipelines.formats.packed.tar_shard import SHARD_SUFFIX, write_shard
from pipelines.formats.registry import FORMATS
from pipelines.io import WrittenFile
from pipelines.storage.location import Location
from preprocess.conversion.task_result import DamagedSourceError, TaskResult, WorkItem, convert_if_stale


@dataclass(frozen=True, slots=True)
class ConvertTask:
    """Convert samples to the format `format_name` in `target`, packed ones with the preset `codec`.

    The source of a work item is a SampleDataset: of one sample, or of those that become one shard.
    """

    target: Location
    format_name: str
    codec: str

    def __call__(self, item: WorkItem) -> TaskResult:
        """Convert the samples of `item` unless their entry is up to date."""
        dataset: SampleDataset = item.source
        (name,) = item.entries
        files = dict.fromkeys(path for index in range(len(dataset)) for path in dataset.files(index))

        def convert() -> Iterator[tuple[str, Sequence[WrittenFile]]]:
            if self.format_name == PackedFormat.name:
                yield name, write_shard(self.target / (name + SHARD_SUFFIX), _members(dataset, self.codec))
            else:
                sample = dataset.read(0, verify=True)
                yield name, FORMATS[self.format_name].write(self.target, name, sample)

        return convert_if_stale(
            item, self.target, lambda: SourceFingerprint.from_files(dataset.names, files), convert
        )


def _members(dataset: SampleDataset, codec: str) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the members of a shard of all samples of `dataset`, packed with the preset `codec`.

    Raises:
        DamagedSourceError: After the last sample, if some are damaged or cannot be read.
    """
    errors: list[DataError] = []
    for index in range(len(dataset)):
        try:
            # Not named: the counts are freed when they are encoded, and not when the next ones are there.
            encoded = encode(dataset.read(index, verify=True), codec)
        except DataError as error:
            errors.append(error)
        else:
            yield dataset.sample_id(index) + MEMBER_SUFFIX, encoded
    if errors:
        raise DamagedSourceError(errors, len(dataset))
