"""Everything a run needs to go on exactly, in one file that is either whole or not there.

A checkpoint is a torch file of tensors and plain values. Its position is the epoch and the samples
consumed in it: with the seed these give the plan, and with the plan every later batch, for any
number of ranks that keeps the global batch. No random state is stored because none is kept: every
draw (order, symmetry, dropout) is seeded by (seed, epoch, step).
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import DataError
from pipelines.io import TEMPORARY_SUFFIX, write_atomically

VERSION = 1
KEEP = 3
"""Checkpoints kept; a damaged newest one falls back to the one before it."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: the epoch, and the samples all ranks together have consumed in it."""

    epoch: int = 0
    samples: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a run between two steps.

    config: the resolved configuration, as plain mappings.
    seed: of every random draw.
    global_batch, train_samples: samples a step and in the training split; the plan needs both.
    position: of the next sample to train on.
    model, optimizer, scaler: their state dicts; `scaler` is None where the precision needs none.
    scores: the newest validation scores and the residuals' root mean squares, or None.
    seconds: training time so far, by phase.
    division: into what shares the nodes had divided the data; the plan needs this too.
    skipped: the paths of the damaged samples of each split that were passed over so far.
    logs: bytes that belong to this state, by log file name; what lies behind them came later.
    """

    config: dict[str, Any]
    seed: int
    global_batch: int
    train_samples: int
    position: Position
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    division: str = "one share"
    skipped: dict[str, list[str]] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)

    def save(self, directory: Path) -> Path:
        """Write this checkpoint into `directory` and drop all but the newest `KEEP`."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"epoch{self.position.epoch:05d}_sample{self.position.samples:09d}.pt"
        state = {name: getattr(self, name) for name in self.__slots__}
        state |= {"version": VERSION, "position": [self.position.epoch, self.position.samples]}
        write_atomically(path, lambda file: torch.save(state, file))
        # One rank writes here, so what is half written was left by a process that has died.
        for old in [*list(_newest_first(directory))[KEEP:], *directory.glob(f".*{TEMPORARY_SUFFIX}")]:
            old.unlink()
        return path

    @staticmethod
    def load(path: Path) -> Checkpoint:
        """The checkpoint at `path`; DataError where it is missing, damaged or something else."""
        if not path.is_file():
            raise DataError(path, "is not a file", "give a checkpoint (.pt) that a run has written")
        try:
            # torch reads a flipped bit without a word; the zip container it writes has CRCs.
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad is not None:
                raise DataError(path, f"is damaged: wrong CRC in {bad}", "use an older checkpoint")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except DataError:
            raise
        except Exception as error:  # zip, pickle and torch each have their own for a broken file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(path, f"is no readable checkpoint ({reason})", "use an older one") from error
        if not isinstance(state, dict) or "version" not in state:
            raise DataError(path, "is not a checkpoint of this program", "give one that a run has written")
        if state["version"] != VERSION:
            raise DataError(
                path,
                f"has checkpoint version {state['version']}",
                f"this program reads version {VERSION}",
            )
        del state["version"]
        state["position"] = Position(*state["position"])
        return Checkpoint(**state)

    @staticmethod
    def newest(directory: Path) -> Checkpoint | None:
        """The newest whole checkpoint in `directory`; a damaged one is passed over with a warning."""
        for path in _newest_first(directory):
            try:
                return Checkpoint.load(path)
            except DataError as error:
                warnings.warn(f"{error}: falling back to the one before it", stacklevel=2)
        return None


def _newest_first(directory: Path) -> Iterator[Path]:
    names = re.compile(r"epoch\d+_sample\d+\.pt")
    entries = os.listdir(directory) if directory.is_dir() else []
    return (directory / name for name in sorted(filter(names.fullmatch, entries), reverse=True))
