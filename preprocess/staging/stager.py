"""Stage a data set to the nodes' own disks: all of it on each, or partitions of it, decompressed on the way.

Nodes that get the same samples form a team. One rank of a team reads each file from the shared file system
and sends it to its peers on the team's other nodes as it is, compressed. Each node validates and writes it:
packed samples as they are, others decompressed, as npy. Samples that a node has already, complete and of the
same source, are kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.manifest import SourceFingerprint
from pipelines.dataset.open import dataset_from_shards
from pipelines.distributed.node_groups import NodeGroup
from pipelines.distributed.session import Session
from pipelines.errors import DataError
from pipelines.filesystem import free_space
from pipelines.formats.npy import Npy
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import FIRST_MEMBER_OFFSET, SHARD_SUFFIX
from pipelines.io import TarMember
from pipelines.plan import Partition
from pipelines.slab import Slab
from preprocess.conversion.journal import Journal, load_records
from preprocess.conversion.target import commit
from preprocess.staging import inventory
from preprocess.staging.config import StageConfig, partition_indices
from preprocess.staging.transfer import indices_for_local_rank, relay, staged_format

_MAX_OVERHEAD = 2048
"""Upper bound of the bytes that a staged file has beside its sample: the headers and the end of a tar."""


@dataclass(frozen=True, slots=True)
class StagingReport:
    """Result of staging, for all nodes together.

    samples: Samples that are now on the nodes which lacked them.
    read_bytes: Bytes read from the shared file system.
    written_bytes: Bytes written to all nodes' disks.
    faults: One line for each damaged sample, which is on no node; samples of one file have the same line.
    seconds: Duration.
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
    num_instances: int = 1,
    *,
    nodes_per_sample: int = 1,
    skip_source_check: bool = False,
) -> list[tuple[SampleDataset, StagingReport]]:
    """Stage this node's samples of `splits` to folders of the same names in `root`; all ranks call this.

    Args:
        splits: The datasets on the shared file system by name.
        root: Folder on the node's own disk.
        config: Which samples each node gets, and how they are read.
        session: The ranks.
        num_instances: Number of models that train side by side on these nodes.
        nodes_per_sample: Number of consecutive nodes whose ranks share every sample. Each then keeps only
            its slab of packed samples; whole ones are read from `splits`.
        skip_source_check: Take a complete folder as up to date without comparing it with the source files,
            for data that has just been staged.

    Returns:
        For each split the dataset on this node's disk and the report.

    Raises:
        UserError: On every rank that can still be reached, if a node lacks space or a file cannot be read or
            written.
    """
    teams = config.teams(session.world.nodes, num_instances, nodes_per_sample)
    slab = None
    if nodes_per_sample > 1:
        # Those of its ranks together. Without periodic ends less is read of it.
        slab = Slab(session.world.node % nodes_per_sample, nodes_per_sample, periodic=True)
    stager = _Stager(config, session, NodeGroup(session, teams), slab, skip_source_check)
    with ExitStack() as locks:
        plans = [stager.plan(split, root / name, locks) for name, split in splits.items()]
        session.run_on_all_ranks(lambda: _check_space(root, plans))
        return [(_staged_dataset(plan.split, plan.target, plan.slab), stager.copy(plan)) for plan in plans]


def describe(split: SampleDataset, report: StagingReport, nodes: int) -> str:
    """Return one line on the staging of `split` for the console."""
    rate = report.read_bytes / report.seconds / 1e9
    return (
        f"{split.root}: staged {report.samples} of {split.total} samples on {nodes} nodes "
        f"in {report.seconds:.1f} s, {report.read_bytes:,} bytes read ({rate:.2f} GB/s), "
        f"{report.written_bytes:,} written"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """Work on the folder `target` of this node.

    split: The samples that it is to hold.
    slab: The part of each that it is to hold; None for all of it.
    fingerprints: Of their sources, (samples,) FINGERPRINT.
    missing: Which of them this node lacks, (samples,) bool.
    missing_in_team: Which of them any node of its team lacks, (samples,) bool.
    opened: Whether this rank has opened the folder, and is to commit it.
    seconds: Duration of the planning.
    """

    split: SampleDataset
    slab: Slab | None
    target: Path
    fingerprints: npt.NDArray[Any]
    missing: npt.NDArray[np.bool_]
    missing_in_team: npt.NDArray[np.bool_]
    opened: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class _Stager:
    """Staging of one split after the other, with the ranks of `group` on other nodes."""

    config: StageConfig
    session: Session
    group: NodeGroup
    slab: Slab | None
    skip_source_check: bool

    def plan(self, split: SampleDataset, target: Path, locks: ExitStack) -> _Plan:
        """Find the samples of `split` that `target` lacks; `locks` keeps the lock of the folder."""
        start, session, group, whole = time.perf_counter(), self.session, self.group, split
        leads = session.world.local_rank == 0
        if group.num_groups > 1:
            seed = self.config.seed if self.config.preshuffle else None
            indices = partition_indices(len(whole), group.number, group.num_groups, seed)
            split = whole.subset(indices, Partition(indices, group.num_groups, len(whole), seed))
        # In an npy file a hole would be counts of zero; chunks of packed samples have checksums.
        slab = self.slab if split.sharded else None
        if slab is not None:
            split.check_slab(slab)
        fingerprints, opened = np.empty(0, inventory.FINGERPRINT), False
        missing = missing_in_team = np.zeros(len(split), dtype=bool)
        complete = self.skip_source_check and all(
            session.gather(session.run_on_all_ranks(lambda: not leads or _is_complete(split, target, slab)))
        )
        if not complete:
            fingerprints = inventory.compute_fingerprints(whole, session)
            fingerprints = fingerprints[split.global_indices(np.arange(len(split)))]
            if slab is not None:
                fingerprints = inventory.of_slab(fingerprints, slab)
            find = partial(inventory.find_missing, split, whole, target, fingerprints, session.world, locks)
            found = session.run_on_all_ranks(lambda: find() if leads else None)
            opened = found is not None
            # As bits, since every rank gets the masks of all nodes.
            masks = session.gather((group.number, np.packbits(missing if found is None else found)))
            of_team = np.bitwise_or.reduce([bits for number, bits in masks if number == group.number])
            missing_in_team = _unpack(of_team, split)
            missing = _unpack(masks[session.world.rank - session.world.local_rank][1], split)
        seconds = time.perf_counter() - start
        return _Plan(split, slab, target, fingerprints, missing, missing_in_team, opened, seconds)

    def copy(self, plan: _Plan) -> StagingReport:
        """Copy the samples that the team's nodes lack to their disks."""
        start, session, split = time.perf_counter(), self.session, plan.split
        format_name = staged_format(split)
        own = indices_for_local_rank(np.flatnonzero(plan.missing_in_team), session.world).tolist()
        read_bytes = written_bytes = 0
        faults: dict[str, str] = {}
        lacking = {i: SourceFingerprint(*plan.fingerprints[i].item()) for i in own if plan.missing[i]}
        if own:
            slab, threads, direct = plan.slab, self.config.threads, self.config.direct_io
            samples = relay(split, plan.target, own, self.group, lacking, threads, slab=slab, direct=direct)
            settings = plan.target, format_name, split.spec, session.world.local_rank
            # The folder of a node that lacks nothing may not be open.
            with session.own_errors(), Journal(*settings) if lacking else nullcontext() as journal:
                if journal:
                    journal.begin(map(split.sample_id, lacking))
                for done in samples:
                    read_bytes += done.read_bytes
                    if done.fault:
                        faults[split.names[done.sample]] = done.fault
                    elif done.entry and journal:
                        journal.add([done.entry])
                        written_bytes += done.written_bytes
        num_samples = len(own) if self.group.group_rank == 0 else 0
        reports = session.gather((num_samples, read_bytes, written_bytes, faults))
        # Every node that lacks a damaged sample may have reported it.
        damaged = {name: fault for report in reports for name, fault in report[3].items()}

        def commit_opened() -> None:
            if plan.opened:
                records = load_records(plan.target, format_name, split.spec).entries
                names = (split.sample_id(index) for index in range(len(split)))
                entries = [records[name] for name in names if name in records and records[name].files]
                commit(plan.target, format_name, split.spec, entries)

        session.run_on_all_ranks(commit_opened)
        return StagingReport(
            samples=sum(report[0] for report in reports) - len(damaged),
            read_bytes=sum(report[1] for report in reports),
            written_bytes=sum(report[2] for report in reports),
            faults=tuple(sorted(damaged.values())),
            seconds=plan.seconds + time.perf_counter() - start,
        )


def _unpack(bits: npt.NDArray[np.uint8], split: SampleDataset) -> npt.NDArray[np.bool_]:
    """Return `bits` as a mask (samples,) bool."""
    return np.unpackbits(bits, count=len(split)).astype(bool)


def _check_space(root: Path, plans: Sequence[_Plan]) -> None:
    """Raise DataError if this rank has opened folders for more than the disk has space for."""
    needed = free = 0
    for plan in plans:
        if plan.opened:
            space = free_space(plan.target)
            if space is None:
                return
            free, block = space
            split, count = plan.split, np.count_nonzero(plan.missing)
            lengths = np.full(count, split.spec.bytes)
            if split.sharded:
                lengths = split.member_extents["bytes"][plan.missing]
                if plan.slab is not None:
                    # An estimate: some slabs have more particles than others.
                    lengths = lengths * plan.slab.shape(split.spec)[0] // split.spec.size
            # In whole blocks, and one for the small file beside each: the label, or the index.
            needed += int((-(-(lengths + _MAX_OVERHEAD) // block) * block + block).sum())
    if needed > free:
        fault = f"has {free} bytes free on {os.uname().nodename}, but staging needs {needed}"
        raise DataError(root, fault, "free some space, or stage to another disk")


def _is_complete(split: SampleDataset, target: Path, slab: Slab | None) -> bool:
    """Return whether `target` is a complete copy of `split`, or of at least `slab` of its samples."""
    if not inventory.is_staged(split, target):
        return False
    if split.sharded and len(split):
        # A copy of other slabs has the same names.
        try:
            _staged_dataset(split, target, slab).payload(0, slab=slab)
        except DataError:
            return False
    return True


def _staged_dataset(split: SampleDataset, target: Path, slab: Slab | None) -> SampleDataset:
    """Return the samples of `split` as they, or `slab` of them, are staged in `target`."""
    names = [split.sample_id(index) for index in range(len(split))]
    if not split.sharded:
        files = tuple(name + Npy.suffix for name in names)
        return SampleDataset(target, Npy.name, files, split.spec, partition=split.partition)
    lengths = split.member_extents["bytes"].tolist()
    shards = (
        (name + SHARD_SUFFIX, (TarMember(name + MEMBER_SUFFIX, FIRST_MEMBER_OFFSET, length),))
        for name, length in zip(names, lengths, strict=True)
    )
    whole = None if slab is None else split
    return replace(dataset_from_shards(target, shards, split.spec), partition=split.partition, whole=whole)
