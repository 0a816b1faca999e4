"""The task of copying samples as they are: files of a folder, or members of its shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import crc32c

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.manifest import MANIFEST, Entry, FileRecord, SourceFingerprint
from pipelines.errors import DataError
from pipelines.formats.packed.tar_shard import SHARD_SUFFIX
from pipelines.io import WrittenFile
from pipelines.storage.base import Storage
from pipelines.storage.location import Location
from pipelines.storage.parallel import map_ahead
from pipelines.storage.select import storage_of
from preprocess.conversion.convert_task import write_members
from preprocess.conversion.task_result import Announce, TaskResult, WorkItem, convert_if_stale

PIECE_BYTES, CALLS = 8 << 20, 8
"""Length of a request for a part of a file, and requests at a time of one process."""


@dataclass(frozen=True, slots=True)
class CopyTask:
    """Copy samples to `target` without a change, checked by the checksums of the manifest or of the format.

    The source of a work item is a SampleDataset of the samples of one entry, and the entry's record in the
    manifest if all its files are copied: there is a manifest, and these are all samples of the entry.
    """

    target: Location

    def __call__(self, item: WorkItem) -> TaskResult:
        """Copy the samples of `item` unless their entry is up to date."""
        dataset: SampleDataset
        record: Entry | None
        dataset, record = item.source
        (name,) = item.entries
        files = dict.fromkeys(path for index in range(len(dataset)) for path in dataset.files(index))

        def packed(index: int) -> list[bytes]:
            return list(dataset.read_contents(index).values())

        def copy(announce: Announce) -> Iterator[tuple[str, Sequence[WrittenFile]]]:
            if record is not None:
                yield name, [self._copy_file(path, file) for path, file in record.files_in(dataset.root)]
            elif dataset.sharded:
                path = self.target / (name + SHARD_SUFFIX)
                yield name, write_members(path, dataset, packed, announce, CALLS)
            else:
                contents = _contents(dataset)
                storage = storage_of(self.target)
                paths = {key: self.target / (name + key) for key in contents}
                yield name, [storage.write(paths[key], content) for key, content in contents.items()]

        return convert_if_stale(
            item, self.target, lambda: SourceFingerprint.from_files(dataset.names, files), copy
        )

    def _copy_file(self, path: Location, file: FileRecord) -> WrittenFile:
        """Copy the file at `path`, whose record is `file`.

        Raises:
            DataError: Its content is not what the record says.
        """

        def copy(storage: Storage) -> WrittenFile:
            def pieces() -> Iterator[bytes]:
                length = checksum = 0
                starts = range(0, file.bytes, PIECE_BYTES)
                read = partial(storage.read_range, path, length=PIECE_BYTES)
                for piece in map_ahead(read, starts, CALLS):
                    length, checksum = length + len(piece), crc32c.crc32c(piece, checksum)
                    yield piece
                if (length, checksum) != (file.bytes, file.crc32c):
                    fault = f"its length or CRC-32C is not that in {MANIFEST}"
                    raise DataError(path, fault, "upload it again, or regenerate the manifest")

            target = self.target / path.name
            return storage_of(target).write_stream(target, pieces())

        return storage_of(path).retry_damaged(copy)._replace(members=file.members)


def _contents(dataset: SampleDataset) -> dict[str, bytes]:
    """Return the contents of the files of the only sample of `dataset`, by suffix, which are valid."""

    def read(storage: Storage) -> dict[str, bytes]:
        contents = replace(dataset, storage=storage).read_contents(0)
        dataset.format.parse(dataset.path(0), contents, dataset.spec)
        return contents

    return dataset.storage.retry_damaged(read)
