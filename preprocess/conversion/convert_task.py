"""The task of converting samples from one format to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from pipelines.storage.parallel import map_ahead
from preprocess.conversion.task_result import (
    Announce,
    DamagedSourceError,
    TaskResult,
    WorkItem,
    convert_if_stale,
)


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

        def packed(index: int) -> Iterable[bytes]:
            # Not named: the counts are freed when they are encoded, and not when the next ones are there.
            return encode(dataset.read(index, verify=True), self.codec)

        def convert(announce: Announce) -> Iterator[tuple[str, Sequence[WrittenFile]]]:
            if self.format_name == PackedFormat.name:
                yield name, write_members(self.target / (name + SHARD_SUFFIX), dataset, packed, announce)
            else:
                sample = dataset.read(0, verify=True)
                yield name, FORMATS[self.format_name].write(self.target, name, sample)

        return convert_if_stale(
            item, self.target, lambda: SourceFingerprint.from_files(dataset.names, files), convert
        )


def write_members(
    path: Location,
    dataset: SampleDataset,
    packed: Callable[[int], Iterable[bytes]],
    announce: Announce,
    calls: int = 1,
) -> tuple[WrittenFile, ...]:
    """Write all samples of `dataset` as the shard at `path`.

    Args:
        path: The shard.
        dataset: The samples.
        packed: Returns the pieces of a sample's content, given its index.
        announce: Called before the shard appears.
        calls: Calls of `packed` at a time, in threads.

    Raises:
        DamagedSourceError: After the last sample, if some are damaged or cannot be read: there is no shard.
    """

    def attempt(index: int) -> Iterable[bytes] | DataError:
        try:
            return packed(index)
        except DataError as error:
            return error

    def members() -> Iterator[tuple[str, Iterable[bytes]]]:
        errors: list[DataError] = []
        indices = range(len(dataset))
        contents = map_ahead(attempt, indices, calls) if calls > 1 else map(attempt, indices)
        for index, content in enumerate(contents):
            if isinstance(content, DataError):
                errors.append(content)
            else:
                yield dataset.sample_id(index) + MEMBER_SUFFIX, content
        if errors:
            raise DamagedSourceError(errors, len(dataset))

    return write_shard(path, members(), before=announce)
