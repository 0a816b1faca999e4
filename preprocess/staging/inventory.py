"""Compare a folder on a node's own disk with the samples that it is to hold."""

from __future__ import annotations

import functools
import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.manifest import Manifest, SourceFingerprint
from pipelines.distributed.locks import locked
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.errors import DataError, UnreadableError, writing
from pipelines.filesystem import refuse_input
from pipelines.slab import Slab
from pipelines.storage.parallel import map_ahead
from preprocess.conversion.journal import load_records
from preprocess.conversion.read_failures import ConsecutiveReadFailures
from preprocess.conversion.target import files_by_entry, remove_files, reopen
from preprocess.staging.transfer import staged_format

FINGERPRINT = np.dtype([("bytes", "<i8"), ("digest", "U16")])
"""A SourceFingerprint, as an element of an array of many; `item` and `tolist` return tuples equal to it."""

_UNKNOWN = SourceFingerprint(0, "")
"""Fingerprint of a file that cannot be read; no staged sample has it."""


def find_missing(
    split: SampleDataset,
    whole: SampleDataset,
    target: Path,
    fingerprints: npt.NDArray[Any],
    world: World,
    locks: ExitStack,
) -> npt.NDArray[np.bool_] | None:
    """Find the samples of `split` that `target` lacks, and open it for them.

    The folder is a cache: copies that are stale, that other nodes hold now or that the source no longer has
    are removed.

    Args:
        split: Samples that this node is to hold.
        whole: All samples of the source.
        target: This node's folder.
        fingerprints: Of the sources of `split`, (samples,) FINGERPRINT.
        world: The ranks.
        locks: Keeps the lock of `target`.

    Returns:
        A mask (samples,) bool, or None for a folder that is complete and stays as it is.

    Raises:
        DataError: The folder is the source, or holds something else, or another node writes into it.
    """

    def check_holder(holder: str) -> None:
        # Only another model on this node may be staging the same. If another rank of this job holds the lock,
        # waiting would never end.
        if not world.other_local_ranks:
            fault = f"is being written into by {holder}"
            raise DataError(target, fault, "stage to each node's own disk, one run at a time")

    # Files that do not belong here are removed below.
    refuse_input(target, [split.root])
    if is_staged(split, target, fingerprints):
        return None
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        locks.enter_context(locked(target, check_holder))
    format_name, names = staged_format(split), list(map(split.sample_id, range(len(split))))
    records = load_records(target, format_name, split.spec).entries
    files = files_by_entry(target, format_name)
    source = set(map(whole.sample_id, range(len(whole))))
    for name in files:
        if name not in records and name not in source:
            fault = f"holds {files[name][0]}, which is not a sample of the source as {format_name}"
            raise DataError(target, fault, "remove it, or choose another folder")
    if files and source.isdisjoint(files):
        # A folder that was named by mistake must not be emptied.
        fault = f"holds {min(files)} and no sample of this source"
        raise DataError(target, fault, "choose another folder")
    up_to_date = {
        name: records[name]
        for name, fingerprint in zip(names, fingerprints.tolist(), strict=True)
        if name in records and records[name].source == fingerprint and records[name].is_complete_in(target)
    }
    # What is removed for other nodes stays recorded until then: a run that is killed here must know it again.
    own = set(names)
    others = [entry for name, entry in records.items() if name not in own]
    reopen(target, format_name, split.spec, [*up_to_date.values(), *others])
    remove_files(target, format_name, (name for name in files if name not in up_to_date))
    return np.array([name not in up_to_date for name in names], dtype=bool)


def of_slab(fingerprints: npt.NDArray[Any], slab: Slab) -> npt.NDArray[Any]:
    """Return the fingerprints of copies that hold `slab` alone, given those of the sources."""
    marked = fingerprints.copy()
    for row, digest in enumerate(fingerprints["digest"].tolist()):
        text = f"{digest} {slab.index} {slab.count}"
        marked["digest"][row] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return marked


def is_staged(split: SampleDataset, target: Path, fingerprints: npt.NDArray[Any] | None = None) -> bool:
    """Return whether `target` is complete with a manifest of `split`, made from `fingerprints` if given."""
    manifest = Manifest.load(target)
    if manifest is None or manifest.format_name != staged_format(split):
        return False
    entries = manifest.entries
    return (
        [entry.name for entry in entries] == list(map(split.sample_id, range(len(split))))
        and (fingerprints is None or [entry.source for entry in entries] == fingerprints.tolist())
        and all(entry.is_complete_in(target) for entry in entries)
    )


def compute_fingerprints(split: SampleDataset, session: Session) -> npt.NDArray[Any]:
    """Return the present fingerprint of each sample's files, (samples,) FINGERPRINT; each rank computes some.

    A file that cannot be read gets one that matches nothing: reading it then gives the reason.

    Raises:
        AccessError: Many files in a row cannot be read.
    """
    world = session.world
    # Neighbours lie in one shard, and a parallel file system is slow to return a file's state.
    state_of = functools.lru_cache(maxsize=1)(split.storage.state)
    failures = ConsecutiveReadFailures()

    def fingerprint(index: int) -> tuple[SourceFingerprint, dict[str, str]]:
        try:
            return SourceFingerprint.from_files([split.names[index]], split.files(index), state_of), {}
        except UnreadableError as error:
            return _UNKNOWN, {error.path: error.fault}

    def compute_own() -> npt.NDArray[Any]:
        own, indices = [], range(world.rank, len(split), world.size)
        # A store takes long to answer. Of a shard, which has many samples, one request is enough.
        at_a_time = split.storage.is_remote and not split.sharded
        for found, unreadable in map_ahead(fingerprint, indices) if at_a_time else map(fingerprint, indices):
            failures.record(unreadable)
            own.append(found)
        return np.array(own, FINGERPRINT)

    table = np.empty(len(split), FINGERPRINT)
    for rank, own in enumerate(session.gather(session.run_on_all_ranks(compute_own))):
        table[rank :: world.size] = own
    return table
