"""Copy samples to the nodes' own disks: one rank of a team reads each file, and all its nodes write it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.manifest import Entry, SourceFingerprint
from pipelines.distributed.node_groups import NodeGroup
from pipelines.distributed.world import World
from pipelines.errors import AccessError, DataError, UnreadableError
from pipelines.formats.npy import Npy
from pipelines.formats.packed.decode import keep_slab, open_packed
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import SHARD_SUFFIX, write_shard
from pipelines.formats.registry import FORMATS
from pipelines.io import WrittenFile
from pipelines.plan import Indices
from pipelines.slab import Slab
from preprocess.conversion.read_failures import ConsecutiveReadFailures


def indices_for_local_rank(wanted: Indices, world: World) -> Indices:
    """Return those of the samples `wanted` that this rank and its peers write to their nodes."""
    return wanted[world.local_rank :: world.local_size]


def indices_to_read(own: Sequence[int], group_rank: int, group_size: int) -> Sequence[int]:
    """Return those of the samples `own` that `group_rank` of `group_size` reads: ranks take turns."""
    return own[group_rank::group_size]


def staged_format(split: SampleDataset) -> str:
    """Return the format that the samples of `split` are staged in."""
    return split.format_name if split.sharded else Npy.name


class RelayedSample(NamedTuple):
    """A sample that has passed this rank.

    sample: Its index.
    read_bytes: Bytes that this rank has read for it.
    entry: Its record, if this rank has written it.
    written_bytes: Bytes that it has written for it.
    fault: The fault that this rank has found.
    """

    sample: int
    read_bytes: int
    entry: Entry | None
    written_bytes: int
    fault: str | None


class _Read(NamedTuple):
    """Bytes of a sample's files, or empty ones and the fault; `unreadable` is for ConsecutiveReadFailures."""

    contents: list[bytes]
    fault: str | None
    unreadable: dict[str, str]


def relay(
    split: SampleDataset,
    target: Path,
    indices: Sequence[int],
    group: NodeGroup,
    lacking: Mapping[int, SourceFingerprint],
    threads: int,
    *,
    slab: Slab | None,
    direct: bool,
) -> Iterator[RelayedSample]:
    """Copy the samples `indices` to `target`; yield each as it is done.

    All ranks of `group` call this with the same `indices`, and take turns at reading; see `indices_to_read`.

    Args:
        split: The dataset that holds the samples.
        target: This node's folder.
        indices: Samples that some node of the team lacks.
        group: The ranks of all nodes that get the same samples.
        lacking: Those of `indices` that this node lacks, with the fingerprints of their sources.
        threads: Number of threads that read, and of threads that write.
        slab: Part of every sample that this node needs; None for all of it.
        direct: Read past the page cache.

    Raises:
        AccessError: This rank cannot write, or cannot read several files in a row.
    """
    nothing = [b""] * len(split.format.keys)

    def read(index: int) -> _Read:
        try:
            return _Read(list(split.read_contents(index, verify=True, direct=direct).values()), None, {})
        except DataError as error:
            unreadable = {error.path: error.fault} if isinstance(error, UnreadableError) else {}
            return _Read(nothing, str(error), unreadable)

    def write(index: int, read_bytes: int, contents: list[bytes], fault: str | None) -> RelayedSample:
        source, entry, written_bytes = lacking.get(index), None, 0
        if source is not None and fault is None:
            try:
                written, omitted = _write(split, target, index, contents, slab)
                entry = Entry.from_written(split.sample_id(index), written, source)
                written_bytes = sum(file.bytes for file in written) - omitted
            except AccessError:
                raise
            except DataError as error:
                fault = str(error)
        return RelayedSample(index, read_bytes, entry, written_bytes, fault)

    own, failures = iter(indices_to_read(indices, group.group_rank, group.size)), ConsecutiveReadFailures()
    reading: deque[Future[_Read]] = deque()
    writing: deque[Future[RelayedSample]] = deque()
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        for turn, index in enumerate(indices):
            while len(reading) < threads and (following := next(own, None)) is not None:
                reading.append(readers.submit(read, following))
            reader = turn % group.size
            contents = fault = None
            if reader == group.group_rank:
                contents, fault, unreadable = reading.popleft().result()
                failures.record(unreadable)
            received = [
                group.broadcast(None if contents is None else contents[file], reader)
                for file in range(len(split.format.keys))
            ]
            if contents is None and not any(received):
                continue  # The peer that could not read it reports why.
            read_bytes = sum(map(len, contents)) if contents is not None else 0
            writing.append(writers.submit(write, index, read_bytes, received, fault))
            if len(writing) > threads:
                yield writing.popleft().result()
        for done in writing:
            yield done.result()


def _write(
    split: SampleDataset, target: Path, index: int, contents: Sequence[bytes], slab: Slab | None
) -> tuple[Sequence[WrittenFile], int]:
    """Write sample `index`, or `slab` of it, in the format that it is staged in.

    Args:
        contents: Bytes of its files.

    Returns:
        The files, and the number of bytes in holes of them.
    """
    name, path = split.sample_id(index), split.path(index)
    if split.sharded:
        (content,), omitted = contents, 0
        open_packed(path, content, split.spec).verify_checksum()
        if slab is not None:
            content, omitted = keep_slab(path, content, split.spec, slab)
        members = [(name + MEMBER_SUFFIX, (content,))]
        return write_shard(target / (name + SHARD_SUFFIX), members, sparse=slab is not None), omitted
    sample = split.format.parse(path, dict(zip(split.format.keys, contents, strict=True)), split.spec)
    return FORMATS[Npy.name].write(target, name, sample), 0
