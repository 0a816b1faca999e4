"""Bring a data set to the nodes' own disks: whole to each, or in shares; inflated on the way.

Nodes that are to have the same samples are a team. Every file is read from the shared file system by
one rank of its team and handed to that rank's peers on the other nodes as it is, compressed; each
node checks and writes it for itself: packed samples as they are, others inflated, as npy. What a
node has already, whole and of the same source, it keeps.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.dataset import Share, Split, of_shards
from pipelines.dist import World
from pipelines.errors import AccessError, ConfigError, DataError
from pipelines.files import Member, Written, locked
from pipelines.formats import FORMATS
from pipelines.formats.npy import Npy
from pipelines.formats.packed import MEMBER, payload_of
from pipelines.manifest import Entry, Source
from pipelines.peers import Peers
from pipelines.plan import Indices, shuffled
from pipelines.shards import FIRST, SHARD, write_shard
from preprocess.output import Journal, begin, finish


@dataclass(frozen=True, slots=True)
class StageConfig:
    """How a data set is staged.

    dir: the folder on each node's own disk, which may name environment variables, such as $TMPDIR; it
        becomes what the shared one is, or a share of it.
    shard_type: "global" gives every node all samples; "local" gives each team of nodes a share, and
        the teams together all of them.
    shard_multiplier: nodes in a team, so copies of each sample, if shard_type is "local".
    preshuffle: draw who gets which samples by `seed`; without it, each team gets every n-th.
    seed: of that draw alone, so that models with seeds of their own find the same shares staged.
    threads: of each rank, which read, inflate and write.
    direct_io: read the shared file system past the page cache.
    """

    dir: str
    shard_type: Literal["global", "local"] = "global"
    shard_multiplier: int = 1
    preshuffle: bool = False
    seed: int = 0
    threads: int = 8
    direct_io: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "shard_multiplier"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stage.{name}", getattr(self, name), "must be at least 1")
        if self.shard_type == "global" and (self.shard_multiplier > 1 or self.preshuffle):
            raise ConfigError(
                "stage.shard_type", self.shard_type, "has one share; the other settings want local"
            )

    @property
    def folder(self) -> Path:
        """`dir` on this node; ConfigError where it names an environment variable that is not set there."""
        folder = os.path.expandvars(self.dir)
        if "$" in folder:
            raise ConfigError("stage.dir", self.dir, "names an environment variable that is not set")
        return Path(folder)

    def teams(self, nodes: int, models: int = 1) -> list[list[int]]:
        """The nodes that have the same samples, for each share, of `nodes` that train `models` side by side.

        Each model has nodes in a row, and all samples on them. ConfigError where the nodes do not
        make up whole models, or a model's nodes whole teams.
        """
        if models < 1 or nodes % models:
            raise ConfigError("models", models, f"do not share out the {nodes} nodes")
        own = nodes // models
        team = own if self.shard_type == "global" else self.shard_multiplier
        if own % team:
            said = f"does not divide the {own} nodes of a model"
            raise ConfigError("stage.shard_multiplier", team, said)
        return [
            [first + place for first in range(share, nodes, own) for place in range(team)]
            for share in range(0, own, team)
        ]


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


def share_of(samples: int, team: int, teams: int, seed: int | None) -> Indices:
    """Which of `samples` samples the `team`-th of `teams` teams keeps, in its order; `seed` draws them."""
    order = np.arange(samples) if seed is None else shuffled(samples, seed, "preshuffle")
    return order[team::teams]


def stage(
    split: Split, target: Path, config: StageConfig, world: World, models: int = 1
) -> tuple[Split, Staged]:
    """Have this node's samples of `split` in `target`: those, and what it took.

    All ranks of `world` call this, whose nodes are going to train `models` models. A UserError, on
    every rank that can still be reached, where a node lacks the space or a file cannot be read or
    written.
    """
    start = time.perf_counter()
    peers, leads = Peers(world, config.teams(world.nodes, models)), world.local_rank == 0
    origins = _origins(split, world)
    if peers.teams > 1:
        seed = config.seed if config.preshuffle else None
        places = share_of(len(split), peers.number, peers.teams, seed)
        share = Share(places, peers.teams, len(split), seed)
        split = split.take(places, share)
        origins = [origins[place] for place in places.tolist()]
    stems, form = [split.stem(index) for index in range(len(split))], _form(split)
    with ExitStack() as held:
        known: dict[str, Entry] = {}

        def refuse() -> None:
            # To wait would be to have the other ranks wait for ever, if one of them is who holds it.
            fault = "is being written into by another process or node"
            raise DataError(target, fault, "stage to each node's own disk, one run at a time")

        def look() -> Indices:
            if not leads:
                return np.arange(0)
            try:
                target.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(target, refuse))
            except OSError as error:
                raise AccessError.writing(target, error) from error
            known.update(begin(target, form, stems))
            lacking = _lacking(target, stems, origins, known)
            _check_space(target, split, lacking)
            return lacking

        lacking = world.gather((peers.number, world.everywhere(look)))
        wanted = np.unique(np.concatenate([share for team, share in lacking if team == peers.number]))
        mine = of_place(wanted, world).tolist()
        read = written = 0
        faults: list[str] = []
        if mine:
            each = _stage_each(split, target, mine, origins, config, peers)
            with Journal(target, world.local_rank) as journal:
                for taken, done in world.alone(each):
                    read += taken
                    if isinstance(done, str):
                        faults.append(done)
                    else:
                        journal.add(done)
                        written += sum(part.bytes for part in done.parts)
        shares = world.gather((len(mine) if peers.place == 0 else 0, read, written, faults))

        def end() -> None:
            if leads and len(wanted):
                entries = begin(target, form, stems)
                finish(target, form, split.spec, [entries[stem] for stem in stems if stem in entries])

        world.everywhere(end)
    staged = Staged(
        samples=sum(share[0] for share in shares),
        read_bytes=sum(share[1] for share in shares),
        written_bytes=sum(share[2] for share in shares),
        faults=tuple(sorted({fault for share in shares for fault in share[3]})),
        seconds=time.perf_counter() - start,
    )
    return _there(split, target), staged


def of_place(wanted: Indices, world: World) -> Indices:
    """Which of the samples `wanted` this rank writes to its node: its peers on other nodes have the same."""
    return wanted[world.local_rank :: world.local_size]


def to_read(mine: list[int], place: int, team: int) -> list[int]:
    """Which of the samples `mine` the peer at `place` of `team` reads for all: they take turns."""
    return mine[place::team]


def describe(split: Split, staged: Staged, nodes: int) -> str:
    """A line for a person on what staging `split` did."""
    rate = staged.read_bytes / staged.seconds / 1e9
    return (
        f"{split.root}: staged {staged.samples} of {split.total} samples on {nodes} nodes "
        f"in {staged.seconds:.1f} s, {staged.read_bytes:,} bytes read ({rate:.2f} GB/s), "
        f"{staged.written_bytes:,} written"
    )


def _form(split: Split) -> str:
    """The format that the samples of `split` are staged in."""
    return split.form if split.extents else Npy.name


def _there(split: Split, target: Path) -> Split:
    """The samples of `split` once they are in `target`."""
    stems = [split.stem(index) for index in range(len(split))]
    if not split.extents:
        names = tuple(stem + Npy.suffix for stem in stems)
        return Split(target, Npy.name, names, split.spec, share=split.share)
    lengths = split.extents.lengths.tolist()
    shards = (
        (stem + SHARD, (Member(stem + MEMBER, FIRST, length),))
        for stem, length in zip(stems, lengths, strict=True)
    )
    return replace(of_shards(target, shards, split.spec), share=split.share)


def _origins(split: Split, world: World) -> list[Source]:
    """What each sample's files are now; each rank looks at some of them, for all."""
    # Neighbours lie in one shard, and a parallel file system is slow to say what a file is.
    source = functools.lru_cache(maxsize=1)(Source.of)

    def look() -> Indices:
        mine = range(world.rank, len(split), world.size)
        found = [source(split.files(index)) for index in mine]
        return np.array(found, dtype=np.int64).reshape(-1, 2)

    table = np.empty((len(split), 2), dtype=np.int64)
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


def _check_space(target: Path, split: Split, lacking: Indices) -> None:
    free, needed = shutil.disk_usage(target).free, len(lacking) * split.spec.bytes
    if split.extents:
        needed = int(split.extents.lengths[lacking].sum())
    if needed > free:
        fault = f"has {free} bytes free on {os.uname().nodename}, and {needed} are to come"
        raise DataError(target, fault, "make room, or stage to another disk")


def _stage_each(
    split: Split,
    target: Path,
    indices: list[int],
    origins: list[Source],
    config: StageConfig,
    peers: Peers,
) -> Iterator[tuple[int, Entry | str]]:
    """Stage the samples `indices`: the bytes that this rank has read for each, and its entry or its fault."""

    def read(index: int) -> list[bytes]:
        return list(split.contents(index, direct=config.direct_io).values())

    def write(index: int, contents: list[bytes]) -> Entry | str:
        stem, path = split.stem(index), split.path(index)
        try:
            if split.extents:
                (content,) = contents
                payload_of(path, content, split.spec, whole=False)
                written: Sequence[Written] = write_shard(
                    target / (stem + SHARD), [(stem + MEMBER, (content,))]
                )
            else:
                named = dict(zip(split.kinds, contents, strict=True))
                sample = split.format.parse(path, named, split.spec)
                written = FORMATS[Npy.name].write(target, stem, sample)
        except AccessError:
            raise
        except DataError as error:
            return str(error)
        return Entry.of(stem, written, origins[index])

    own = iter(to_read(indices, peers.place, peers.size))
    reading: deque[Future[list[bytes]]] = deque()
    writing: deque[tuple[int, Future[Entry | str]]] = deque()
    with ThreadPoolExecutor(config.threads) as readers, ThreadPoolExecutor(config.threads) as writers:
        for turn, index in enumerate(indices):
            while len(reading) < config.threads and (following := next(own, None)) is not None:
                reading.append(readers.submit(read, following))
            place = turn % peers.size
            contents = reading.popleft().result() if place == peers.place else None
            received = [
                peers.broadcast(None if contents is None else contents[at], place)
                for at in range(len(split.kinds))
            ]
            taken = sum(map(len, contents)) if contents is not None else 0
            writing.append((taken, writers.submit(write, index, received)))
            if len(writing) > config.threads:
                count, done = writing.popleft()
                yield count, done.result()
        for count, done in writing:
            yield count, done.result()
