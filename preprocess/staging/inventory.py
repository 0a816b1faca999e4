"""What a folder on a node's own disk lacks of the samples that it is for."""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.manifest import Entry, Manifest, SourceFingerprint
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.errors import AccessError, DataError, UnreadableError
from pipelines.io import locked
from preprocess.conversion.journal import begin, clear, suspend
from preprocess.conversion.read_failures import Lost
from preprocess.staging.transfer import staged_form

ORIGIN = np.dtype([("bytes", "<i8"), ("digest", "S16")])
"""A Source, of which there are many."""

_UNKNOWN = SourceFingerprint(0, "")
"""That of a file which cannot be asked: no sample was made from it."""


def look(
    split: SampleDataset,
    whole: SampleDataset,
    target: Path,
    origins: npt.NDArray[Any],
    world: World,
    held: ExitStack,
) -> npt.NDArray[np.bool_] | None:
    """Which samples `target` lacks, and have it open for them; None where it is whole and left as it is.

    Samples there that are other nodes' now, or that `whole` no longer has, are removed: they are copies.
    """

    def wait() -> None:
        # For another model on this node, which may be staging the same. To wait for anyone else would be to
        # have the other ranks wait for ever, if one of them is who holds it.
        if not world.other_local_ranks:
            fault = "is being written into by another process or node"
            raise DataError(target, fault, "stage to each node's own disk, one run at a time")

    if is_staged(split, target, origins):
        return None
    try:
        target.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(target, wait))
    except OSError as error:
        raise AccessError.writing(target, error) from error
    format_name, stems = staged_form(split), [split.sample_id(index) for index in range(len(split))]
    source = (whole.sample_id(index) for index in range(len(whole)))
    known, unwanted, surplus = begin(target, format_name, split.spec, stems, source, prune=True)
    sound = {
        stem: known[stem]
        for index, stem in enumerate(stems)
        if stem in known and _is_there(known[stem], target, origin_of(origins, index))
    }
    if len(sound) < len(stems):
        suspend(target, format_name, split.spec, [*sound.values(), *unwanted])
        clear(target, format_name, (stem for stem in known if stem not in sound))
    clear(target, format_name, surplus)
    return np.array([stem not in sound for stem in stems], dtype=bool)


def is_staged(split: SampleDataset, target: Path, origins: npt.NDArray[Any] | None = None) -> bool:
    """Whether `target` has a manifest of these samples and is whole, and made from `origins` if given."""
    manifest = Manifest.load(target)
    if manifest is None or manifest.format_name != staged_form(split) or len(manifest.entries) != len(split):
        return False
    return all(
        entry.name == split.sample_id(index) and _is_there(entry, target, origin_of(origins, index))
        for index, entry in enumerate(manifest.entries)
    )


def _is_there(entry: Entry, target: Path, origin: SourceFingerprint | None) -> bool:
    """Whether `entry` is whole in `target`, and made from `origin` if that is known."""
    return origin in (None, entry.source) and entry.is_complete_in(target)


def find_origins(split: SampleDataset, session: Session) -> npt.NDArray[Any]:
    """What each sample's files are now; each rank looks at some of them, for all.

    A file that cannot be asked matches nothing, so staging it tells why; AccessError after many in a row.
    """
    # Neighbours lie in one shard, and a parallel file system is slow to say what a file is.
    world = session.world
    stat, lost = functools.lru_cache(maxsize=1)(os.stat), Lost()

    def ask(index: int) -> SourceFingerprint:
        try:
            found, unread = SourceFingerprint.from_files([split.names[index]], split.files(index), stat), {}
        except UnreadableError as error:
            found, unread = _UNKNOWN, {error.path: error.fault}
        lost.note(unread)
        return found

    def look() -> npt.NDArray[Any]:
        return np.array([ask(index) for index in range(world.rank, len(split), world.size)], ORIGIN)

    table = np.empty(len(split), ORIGIN)
    for rank, share in enumerate(session.gather(session.run_on_all_ranks(look))):
        table[rank :: world.size] = share
    return table


def origin_of(origins: npt.NDArray[Any] | None, index: int) -> SourceFingerprint | None:
    """That of sample `index`, if any is known."""
    if origins is None:
        return None
    length, digest = origins[index].item()
    return SourceFingerprint(length, digest.decode())
