"""Samples on their way to the nodes' own disks: each file read by one rank of its team, written by all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.manifest import Entry, SourceFingerprint
from pipelines.distributed.node_groups import NodeGroup
from pipelines.distributed.world import World
from pipelines.errors import AccessError, DataError, UnreadableError
from pipelines.formats.npy import Npy
from pipelines.formats.packed.decode import open_packed
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import SHARD_SUFFIX, write_shard
from pipelines.formats.registry import FORMATS
from pipelines.io import WrittenFile
from pipelines.plan import Indices
from preprocess.conversion.read_failures import Lost


def of_place(wanted: Indices, world: World) -> Indices:
    """Which of the samples `wanted` this rank writes to its node: its peers on other nodes have the same."""
    return wanted[world.local_rank :: world.local_size]


def to_read(mine: Sequence[int], place: int, team: int) -> Sequence[int]:
    """Which of the samples `mine` the peer at `place` of `team` reads for all: they take turns."""
    return mine[place::team]


def staged_form(split: SampleDataset) -> str:
    """The format that the samples of `split` are staged in."""
    return split.format_name if split.sharded else Npy.name


class _Read(NamedTuple):
    """The bytes of a sample's files, or none and the fault; `unread` is for `Lost.note`."""

    contents: list[bytes]
    fault: str | None
    unread: dict[str, str]


def relay(
    split: SampleDataset,
    target: Path,
    indices: Sequence[int],
    group: NodeGroup,
    *,
    origin: Callable[[int], SourceFingerprint | None],
    threads: int,
    direct: bool,
) -> Iterator[tuple[int, int, Entry | str | None]]:
    """Bring the samples `indices` to `target`: each one, the bytes this rank has read for it, and its entry.

    All peers have the same `indices`, and take turns at reading; see `to_read`.
    origin: what a sample was made from, and None for one that is not wanted on this node.
    threads: that read, and as many that write.

    A fault stands in the entry's place, on the rank that has found it; None where there is neither.
    AccessError where this rank cannot write, or read what it tries in a row.
    """
    nothing = [b""] * len(split.format.keys)

    def read(index: int) -> _Read:
        try:
            return _Read(list(split.read_contents(index, verify=True, direct=direct).values()), None, {})
        except UnreadableError as error:
            return _Read(nothing, str(error), {error.path: error.fault})
        except DataError as error:
            return _Read(nothing, str(error), {})

    def write(index: int, contents: list[bytes], fault: str | None) -> Entry | str | None:
        source = origin(index)
        if fault or source is None:
            return fault
        try:
            return Entry.from_written(split.sample_id(index), _write(split, target, index, contents), source)
        except AccessError:
            raise
        except DataError as error:
            return str(error)

    own, lost = iter(to_read(indices, group.group_rank, group.size)), Lost()
    reading: deque[Future[_Read]] = deque()
    writing: deque[tuple[int, int, Future[Entry | str | None]]] = deque()
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        for turn, index in enumerate(indices):
            while len(reading) < threads and (following := next(own, None)) is not None:
                reading.append(readers.submit(read, following))
            place = turn % group.size
            contents = fault = None
            if place == group.group_rank:
                contents, fault, unread = reading.popleft().result()
                lost.note(unread)
            received = [
                group.broadcast(None if contents is None else contents[at], place)
                for at in range(len(split.format.keys))
            ]
            if contents is None and not any(received):
                continue  # What its reader could not read: that one tells why.
            taken = sum(map(len, contents)) if contents is not None else 0
            writing.append((index, taken, writers.submit(write, index, received, fault)))
            if len(writing) > threads:
                first, count, done = writing.popleft()
                yield first, count, done.result()
        for index, count, done in writing:
            yield index, count, done.result()


def _write(
    split: SampleDataset, target: Path, index: int, contents: Sequence[bytes]
) -> Sequence[WrittenFile]:
    """Write sample `index`, whose files' `contents` these are, in the form that it is staged in."""
    stem, path = split.sample_id(index), split.path(index)
    if split.sharded:
        (content,) = contents
        open_packed(path, content, split.spec).verify_checksum()
        return write_shard(target / (stem + SHARD_SUFFIX), [(stem + MEMBER_SUFFIX, (content,))])
    sample = split.format.parse(path, dict(zip(split.format.keys, contents, strict=True)), split.spec)
    return FORMATS[Npy.name].write(target, stem, sample)
