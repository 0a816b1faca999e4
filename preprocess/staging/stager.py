"""Bring a data set to the nodes' own disks: whole to each, or in shares; inflated on the way.

Nodes that are to have the same samples are a team. Every file is read from the shared file system by
one rank of its team and handed to that rank's peers on the other nodes as it is, compressed; each
node checks and writes it for itself: packed samples as they are, others inflated, as npy. What a
node has already, whole and of the same source, it keeps.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.dataset.dataset import Partition, SampleDataset, dataset_from_shards
from pipelines.distributed.node_groups import NodeGroup
from pipelines.distributed.session import Session
from pipelines.errors import DataError
from pipelines.formats.npy import Npy
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import FIRST_MEMBER_OFFSET, SHARD_SUFFIX
from pipelines.io import TarMember
from preprocess.conversion.journal import Journal, finish, noted
from preprocess.staging.config import StageConfig, share_of
from preprocess.staging.inventory import ORIGIN, find_origins, is_staged, look, origin_of
from preprocess.staging.transfer import of_place, relay, staged_form

_HEADERS = 2048
"""Bytes that a staged file has beside its sample at most: the headers and the end of a tar."""


@dataclass(frozen=True, slots=True)
class Staged:
    """What staging did, on all nodes together.

    samples: that are now on the nodes which lacked them.
    read_bytes: from the shared file system. written_bytes: to all nodes' disks.
    faults: a line for each sample that is damaged, and so is on no node; those of one file have the same.
    """

    samples: int
    read_bytes: int
    written_bytes: int
    faults: tuple[str, ...]
    seconds: float


def stage(
    splits: Mapping[str, SampleDataset],
    root: Path,
    config: StageConfig,
    session: Session,
    models: int = 1,
    *,
    trusted: bool = False,
) -> list[tuple[SampleDataset, Staged]]:
    """Have this node's samples of `splits` in folders of their names in `root`: those, and what it took.

    All ranks of `session` call this, whose nodes are going to train `models` models. `trusted` says
    that they have just been staged: of folders that are whole no source is asked for changes. A
    UserError, on every rank that can still be reached, where a node lacks the space or a file cannot
    be read or written.
    """
    group = NodeGroup(session, config.teams(session.world.nodes, models))
    with ExitStack() as held:
        plans = [
            _plan(split, root / name, config, session, group, held, trusted) for name, split in splits.items()
        ]
        session.run_on_all_ranks(lambda: _check_space(root, plans))
        done = [_fill(plan, config, session, group) for plan in plans]
        return [(_there(plan.split, plan.target), staged) for plan, staged in zip(plans, done, strict=True)]


def describe(split: SampleDataset, staged: Staged, nodes: int) -> str:
    """A line for a person on what staging `split` did."""
    rate = staged.read_bytes / staged.seconds / 1e9
    return (
        f"{split.root}: staged {staged.samples} of {split.total} samples on {nodes} nodes "
        f"in {staged.seconds:.1f} s, {staged.read_bytes:,} bytes read ({rate:.2f} GB/s), "
        f"{staged.written_bytes:,} written"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What is to become of the folder `target` on this node.

    split: the samples that it is for.
    origins: what each was made from, (samples,) ORIGIN.
    own, wanted: which of them this node lacks, and which any node of its team, (samples,) bool.
    opened: whether this rank has opened the folder, and is to finish it.
    seconds: that finding out has taken.
    """

    split: SampleDataset
    target: Path
    origins: npt.NDArray[Any]
    own: npt.NDArray[np.bool_]
    wanted: npt.NDArray[np.bool_]
    opened: bool
    seconds: float


def _plan(
    split: SampleDataset,
    target: Path,
    config: StageConfig,
    session: Session,
    group: NodeGroup,
    held: ExitStack,
    trusted: bool,
) -> _Plan:
    """Find out what `target` lacks of its share of `split`; `held` keeps the right to write it."""
    start, world = time.perf_counter(), session.world
    leads, whole = world.local_rank == 0, split
    if group.num_groups > 1:
        seed = config.seed if config.preshuffle else None
        places = share_of(len(whole), group.number, group.num_groups, seed)
        split = whole.subset(places, Partition(places, group.num_groups, len(whole), seed))
    origins, opened = np.empty(0, ORIGIN), False
    own = wanted = np.zeros(len(split), dtype=bool)
    if not (
        trusted
        and all(session.gather(session.run_on_all_ranks(lambda: not leads or is_staged(split, target))))
    ):
        origins = find_origins(whole, session)[split.global_indices(np.arange(len(split)))]
        looking = partial(look, split, whole, target, origins, world, held)
        lacking = session.run_on_all_ranks(lambda: looking() if leads else None)
        opened = lacking is not None
        # In bits, since every rank hears of all nodes.
        shares = session.gather((group.number, np.packbits(own if lacking is None else lacking)))
        wanted = _mask(
            np.bitwise_or.reduce([bits for number, bits in shares if number == group.number]), split
        )
        own = _mask(shares[world.rank - world.local_rank][1], split)
    return _Plan(split, target, origins, own, wanted, opened, time.perf_counter() - start)


def _mask(bits: npt.NDArray[np.uint8], split: SampleDataset) -> npt.NDArray[np.bool_]:
    """`bits` as (samples,) bool."""
    return np.unpackbits(bits, count=len(split)).astype(bool)


def _check_space(root: Path, plans: Sequence[_Plan]) -> None:
    """DataError where this rank has opened folders for more than the disk has room for."""
    needed = 0
    for plan in plans:
        if plan.opened:
            block = os.statvfs(plan.target).f_frsize
            lengths = np.full(len(plan.split), plan.split.spec.bytes)
            if plan.split.sharded:
                lengths = plan.split.member_extents["bytes"]
            lengths = lengths[plan.own]
            # In whole blocks, one of which is for the small file beside each: the label, or the index.
            needed += int((-(-(lengths + _HEADERS) // block) * block + block).sum())
    if needed and needed > (free := shutil.disk_usage(root).free):
        fault = f"has {free} bytes free on {os.uname().nodename}, and {needed} are to come"
        raise DataError(root, fault, "make room, or stage to another disk")


def _fill(plan: _Plan, config: StageConfig, session: Session, group: NodeGroup) -> Staged:
    """Bring what the team's nodes lack to their disks."""
    start, format_name = time.perf_counter(), staged_form(plan.split)
    mine = of_place(np.flatnonzero(plan.wanted), session.world).tolist()
    read = written = 0
    faults: dict[str, str] = {}
    if mine:
        samples = relay(
            plan.split,
            plan.target,
            mine,
            group,
            origin=lambda index: origin_of(plan.origins, index) if plan.own[index] else None,
            threads=config.threads,
            direct=config.direct_io,
        )
        # A node that lacks nothing may have no folder open.
        told = plan.target, format_name, plan.split.spec, session.world.local_rank
        noting = Journal(*told) if plan.own.any() else nullcontext()
        with noting as journal:
            if journal:
                journal.begin(plan.split.sample_id(index) for index in mine if plan.own[index])
            for index, taken, done in session.tag_rank_errors(samples):
                read += taken
                if isinstance(done, str):
                    faults[plan.split.names[index]] = done
                elif done and journal:
                    journal.add(done)
                    written += sum(part.bytes for part in done.files)
    shares = session.gather((len(mine) if group.group_rank == 0 else 0, read, written, faults))
    # Every node that wants a damaged sample may have found it so.
    damaged = {name: fault for share in shares for name, fault in share[3].items()}

    def end() -> None:
        if plan.opened:
            entries = noted(plan.target, format_name, plan.split.spec)
            stems = (plan.split.sample_id(index) for index in range(len(plan.split)))
            there = (entries[stem] for stem in stems if stem in entries)
            finish(plan.target, format_name, plan.split.spec, [entry for entry in there if entry.files])

    session.run_on_all_ranks(end)
    return Staged(
        samples=sum(share[0] for share in shares) - len(damaged),
        read_bytes=sum(share[1] for share in shares),
        written_bytes=sum(share[2] for share in shares),
        faults=tuple(sorted(damaged.values())),
        seconds=plan.seconds + time.perf_counter() - start,
    )


def _there(split: SampleDataset, target: Path) -> SampleDataset:
    """The samples of `split` once they are in `target`."""
    stems = [split.sample_id(index) for index in range(len(split))]
    if not split.sharded:
        names = tuple(stem + Npy.suffix for stem in stems)
        return SampleDataset(target, Npy.name, names, split.spec, partition=split.partition)
    lengths = split.member_extents["bytes"].tolist()
    shards = (
        (stem + SHARD_SUFFIX, (TarMember(stem + MEMBER_SUFFIX, FIRST_MEMBER_OFFSET, length),))
        for stem, length in zip(stems, lengths, strict=True)
    )
    return replace(dataset_from_shards(target, shards, split.spec), partition=split.partition)
