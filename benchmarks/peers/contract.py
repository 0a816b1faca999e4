"""The contract of a row in the table of loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from pipelines.sample import Sample

WORKERS = 2
"""Worker processes, or threads, of each row."""

AHEAD = 2
"""Batches that each worker prepares ahead."""

Item: TypeAlias = tuple[torch.Tensor, Any]
"""A batch of one: volume (1, 4, size, size, size) float32 in any memory layout, and target (1, 4) or (4,)."""


@dataclass(frozen=True, slots=True)
class Job:
    """Samples to deliver.

    Attributes:
        folder: Files of the row.
        size: Edge in voxels.
        samples: Samples in the folder.
        epochs: How many times each is delivered, in random order.
    """

    folder: Path
    size: int
    samples: int
    epochs: int

    def order(self) -> Iterator[int]:
        """Yield the samples of all epochs."""
        generator = np.random.default_rng(0)
        for _ in range(self.epochs):
            yield from generator.permutation(self.samples).tolist()


class Resume(NamedTuple):
    """Promises of the documentation of a loader about a resume in the middle of an epoch.

    Attributes:
        exact: With the samples that are left of the epoch, each once.
        other_ranks: Also on another number of ranks.
        source: Where this is documented.
    """

    exact: bool
    other_ranks: bool
    source: str


@dataclass(frozen=True, slots=True)
class Peer:
    """A row of the table.

    Attributes:
        name: Name of the row.
        modules: Modules that it needs, imported in this order before anything is timed.
        files: Folder of its files; rows with the same one share them.
        write: Writes samples to a folder. A sample that is repeated is the same object each time.
        open: Iterates over batches. A volume is valid until the next one is taken.
        resume: See there.
        plain: The straightforward program; the others also keep freed memory, as this project's trainer does.
    """

    name: str
    modules: tuple[str, ...]
    files: str
    write: Callable[[Path, Sequence[Sample]], None]
    open: Callable[[Job], Iterator[Item]]
    resume: Resume
    plain: bool = False
