"""Checkpoints: all state needed to resume a run exactly, in one file that is written atomically.

A checkpoint is a torch file of tensors and plain values. Its position is the epoch and the samples
consumed in it: with the seed these give the plan, and with the plan every later batch, for any
number of ranks that keeps the global batch. No random state is stored because none is kept: every
draw (order, symmetry, dropout) is seeded by (seed, epoch, step).
"""

from __future__ import annotations

import io
import logging
import os
import re
import zipfile
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import DataError, writing
from pipelines.io import TEMPORARY_SUFFIX, write_file

VERSION = 2
"""Version 1 has no `mlperf_log`."""

KEEP = 3
"""Number of checkpoints kept, so that an older one can replace a damaged one."""

_NAME = re.compile(r"epoch\d+_sample\d+\.pt")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Position:
    """Progress of a run: the epoch, and the samples that all ranks together have consumed in it."""

    epoch: int = 0
    samples: int = 0

    @property
    def begun_epochs(self) -> int:
        """Number of epochs that are done or begun."""
        return self.epoch + (self.samples > 0)

    def __str__(self) -> str:
        done = f"{self.epoch} epoch{'s' * (self.epoch != 1)}"
        return f"{done} and {self.samples} samples of the next" if self.samples else done


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a run between two steps.

    Args:
        config: Resolved configuration, as nested mappings.
        seed: Seed of every random draw.
        global_batch: Samples per step on all ranks; part of the plan.
        train_samples: Samples in the training split; part of the plan.
        position: Position of the next sample to train on.
        model: State dict of the network.
        optimizer: State dict of the optimizer.
        scaler: State dict of the gradient scaler; None if the precision needs none.
        scores: Newest validation scores and root mean square residuals, or None.
        seconds: Training time so far, by phase.
        fingerprints: `SampleDataset.fingerprint` of each split; none in checkpoints of earlier versions.
        division: Partition of the data among the nodes; part of the plan.
        skipped: Paths of the damaged samples of each split that were skipped so far.
        logs: Bytes of each log file that belong to this state; the rest was written later.
        mlperf_log: These bytes of the MLPerf log; empty in version 1.
        kernels: Kernel of each block on rank 0's GPU; see `choose_kernels`.
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
    fingerprints: dict[str, list[str]] = field(default_factory=dict)
    division: str = "one share"
    skipped: dict[str, list[str]] = field(default_factory=dict)
    logs: dict[str, int] = field(default_factory=dict)
    mlperf_log: str = ""
    kernels: list[str] = field(default_factory=list)

    def save(self, directory: Path) -> Path:
        """Write this checkpoint into `directory`, remove all but the newest `KEEP`, and return its path."""
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"epoch{self.position.epoch:05d}_sample{self.position.samples:09d}.pt"
        state = {name: getattr(self, name) for name in self.__slots__}
        state |= {"version": VERSION, "position": [self.position.epoch, self.position.samples]}
        # Into memory: torch replaces an error of the file by one of its own, without the reason.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(path, buffer.getbuffer())
        # Only one rank writes here, so temporary files are those of a killed process.
        with writing(directory):
            for old in [*_newest_first(directory)[KEEP:], *directory.glob(f".*{TEMPORARY_SUFFIX}")]:
                old.unlink()
        return path

    @staticmethod
    def load(path: Path) -> Checkpoint:
        """Return the checkpoint at `path`; raise DataError if it is missing, damaged or of another kind."""
        state = read_state(path)
        if "version" not in state:
            raise _foreign(path, "it has no version")
        if (version := state.pop("version")) not in (1, VERSION):
            remedy = f"this program reads versions 1 to {VERSION}"
            raise DataError(path, f"has checkpoint version {version}", remedy)
        for part in fields(Checkpoint):
            if part.name not in state and part.default is part.default_factory is MISSING:
                raise _foreign(path, f"it has no {part.name}")
            if part.name in ("config", "model", "optimizer") and not isinstance(state[part.name], dict):
                raise _foreign(path, f"its {part.name} is not a mapping")
        known = {part.name: state[part.name] for part in fields(Checkpoint) if part.name in state}
        return Checkpoint(**known | {"position": Position(*state["position"])})

    @staticmethod
    def newest(directory: Path) -> Checkpoint | None:
        """Return the newest intact checkpoint in `directory`, if any; log a warning for each damaged one."""
        for path in _newest_first(directory):
            try:
                return Checkpoint.load(path)
            except DataError as error:
                logger.warning("%s; falling back to the checkpoint before it", error)
        return None


def read_state(path: Path) -> dict[str, Any]:
    """Return the mapping of tensors and plain values in the torch file `path`.

    Raises:
        DataError: The file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise DataError(path, "is not a file", "give a checkpoint (.pt) of a run")
    try:
        # torch does not check the CRCs of its zip container.
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise DataError(path, f"is damaged: wrong CRC in {bad}", "use an older checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise many types for a damaged file
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            # torch's own message asks the user to trust the file.
            raise _foreign(path, f"it holds {found[1]}, which is no tensor or plain value") from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(path, f"is not a readable checkpoint ({reason})", "use an older one") from error
    if not isinstance(state, dict):
        raise _foreign(path, "it has no version")
    return state


def _foreign(path: Path, reason: str) -> DataError:
    return DataError(
        path, f"is not a checkpoint of this program ({reason})", "give a checkpoint (.pt) of a run"
    )


def _newest_first(directory: Path) -> list[Path]:
    # No other file, such as a copy that someone keeps there, is to be removed or resumed.
    names = filter(_NAME.fullmatch, os.listdir(directory) if directory.is_dir() else ())
    return [directory / name for name in sorted(names, reverse=True)]
