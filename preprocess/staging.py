"""Bring a data set to the disk of every node: read once, inflated on the way, whole on each.

Every file is read from the shared file system by one rank in the world and handed to that rank's
peers on the other nodes as it is, compressed; each node inflates, checks and writes it for itself,
as npy. What a node has already, whole and of the same source, it keeps.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.dataset import Split
from pipelines.dist import World
from pipelines.errors import AccessError, ConfigError, DataError
from pipelines.files import locked, read_file
from pipelines.formats import FORMATS
from pipelines.manifest import Entry, Source
from pipelines.peers import Peers
from pipelines.plan import Indices
from preprocess.output import Journal, begin, finish

FORM = "npy"


@dataclass(frozen=True, slots=True)
class StageConfig:
    """How a data set is staged.

    dir: the folder on each node's own disk; it becomes what the shared one is.
    threads: of each rank, which read, inflate and write.
    direct_io: read the shared file system past the page cache.
    """

    dir: str
    threads: int = 8
    direct_io: bool = False

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError("stage.threads", self.threads, "must be at least 1")


@dataclass(frozen=True, slots=True)
class Staged:
    """What staging did, on all nodes together.

    read_bytes: from the shared file system. written_bytes: to all nodes' disks.
    faults: a line for each sample that is damaged, and so is on no node.
    """

    samples: int
    read_bytes: int
    written_bytes: int
    faults: tuple[str, ...]
    seconds: float


def stage(split: Split, target: Path, config: StageConfig, world: World) -> tuple[Split, Staged]:
    """Have the samples of `split` in `target` on every node: those, in the same order, and what it took.

    All ranks of `world` call this. A UserError, on every rank that can still be reached, where a
    node lacks the space or a file cannot be read or written.
    """
    start = time.perf_counter()
    stems = [split.stem(index) for index in range(len(split))]
    origins = _origins(split, stems, world)
    peers, leads = Peers(world), world.local_rank == 0
    with ExitStack() as held:
        known: dict[str, Entry] = {}

        def look() -> Indices:
            if not leads:
                return np.arange(0)
            try:
                target.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(target, lambda: None))
            except OSError as error:
                raise AccessError.writing(target, error) from error
            known.update(begin(target, FORM, stems))
            lacking = _lacking(target, stems, origins, known)
            _check_space(target, split, len(lacking))
            return lacking

        wanted = np.unique(np.concatenate(world.gather(world.everywhere(look))))
        mine = of_place(wanted, world).tolist()
        read = written = 0
        faults: list[str] = []
        if mine:
            each = _stage_each(split, target, mine, origins, config, world, peers)
            with Journal(target, world.local_rank) as journal:
                for taken, done in world.alone(each):
                    read += taken
                    if isinstance(done, str):
                        faults.append(done)
                    else:
                        journal.add(done)
                        written += sum(part.bytes for part in done.parts)
        shares = world.gather((read, written, faults))

        def end() -> None:
            if leads and len(wanted):
                entries = begin(target, FORM, stems)
                finish(target, FORM, split.spec, [entries[stem] for stem in stems if stem in entries])

        world.everywhere(end)
    names = tuple(stem + FORMATS[FORM].suffix for stem in stems)
    staged = Staged(
        samples=len(wanted),
        read_bytes=sum(share[0] for share in shares),
        written_bytes=sum(share[1] for share in shares),
        faults=tuple(sorted({fault for share in shares for fault in share[2]})),
        seconds=time.perf_counter() - start,
    )
    return Split(target, FORM, names, split.spec), staged


def of_place(wanted: Indices, world: World) -> Indices:
    """Which of the samples `wanted` this rank writes to its node: its peers on other nodes have the same."""
    return wanted[world.local_rank :: world.local_size]


def to_read(mine: list[int], world: World) -> list[int]:
    """Which of the samples `mine` of a place this rank reads for all peers: one in turn from each node."""
    return mine[world.node :: world.nodes]


def describe(split: Split, staged: Staged, nodes: int) -> str:
    """A line for a person on what staging `split` did."""
    rate = staged.read_bytes / staged.seconds / 1e9
    return (
        f"{split.root}: staged {staged.samples} of {len(split)} samples on {nodes} nodes "
        f"in {staged.seconds:.1f} s, {staged.read_bytes:,} bytes read ({rate:.2f} GB/s), "
        f"{staged.written_bytes:,} written"
    )


def _origins(split: Split, stems: list[str], world: World) -> list[Source]:
    """What each sample's files are now; each rank looks at its share of them, once for all."""
    parts = split.format.parts

    def look() -> Indices:
        mine = stems[world.rank :: world.size]
        found = [Source.of(split.root / (stem + part) for part in parts) for stem in mine]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    table = np.empty((len(stems), 2), dtype=np.int64)
    for rank, share in enumerate(world.gather(world.everywhere(look))):
        table[rank :: world.size] = share
    return [Source(*row) for row in table.tolist()]


def _lacking(target: Path, stems: list[str], origins: list[Source], known: dict[str, Entry]) -> Indices:
    """Which samples are not in `target`, whole and of their origin."""
    return np.array(
        [
            index
            for index, (stem, origin) in enumerate(zip(stems, origins, strict=True))
            if stem not in known or known[stem].source != origin or not known[stem].is_whole_in(target)
        ],
        dtype=np.int64,
    )


def _check_space(target: Path, split: Split, samples: int) -> None:
    free, needed = shutil.disk_usage(target).free, samples * split.spec.bytes
    if needed > free:
        fault = f"has {free} bytes free on {os.uname().nodename}, and {needed} are to come"
        raise DataError(target, fault, "make room, or stage to another disk")


def _stage_each(
    split: Split,
    target: Path,
    indices: list[int],
    origins: list[Source],
    config: StageConfig,
    world: World,
    peers: Peers,
) -> Iterator[tuple[int, Entry | str]]:
    """Stage the samples `indices`: the bytes that this rank has read for each, and its entry or its fault."""
    parts, form = split.format.parts, FORMATS[FORM]

    def read(index: int) -> list[bytes]:
        stem = split.stem(index)
        return [read_file(split.root / (stem + part), direct=config.direct_io) for part in parts]

    def write(index: int, contents: list[bytes]) -> Entry | str:
        stem = split.stem(index)
        try:
            named = dict(zip(parts, contents, strict=True))
            sample = split.format.parse(split.path(index), named, split.spec)
        except DataError as error:
            return str(error)
        return Entry.of(stem, form.write(target, stem, sample), origins[index])

    own = iter(to_read(indices, world))
    reading: deque[Future[list[bytes]]] = deque()
    writing: deque[tuple[int, Future[Entry | str]]] = deque()
    with ThreadPoolExecutor(config.threads) as readers, ThreadPoolExecutor(config.threads) as writers:
        for place, index in enumerate(indices):
            while len(reading) < config.threads and (following := next(own, None)) is not None:
                reading.append(readers.submit(read, following))
            node = place % world.nodes
            contents = reading.popleft().result() if node == world.node else None
            received = [
                peers.broadcast(None if contents is None else contents[at], node) for at in range(len(parts))
            ]
            taken = sum(map(len, contents)) if contents is not None else 0
            writing.append((taken, writers.submit(write, index, received)))
            if len(writing) > config.threads:
                count, done = writing.popleft()
                yield count, done.result()
        for count, done in writing:
            yield count, done.result()
