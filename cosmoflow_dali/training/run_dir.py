"""The folder of a run: creating and resuming it, and its files.

config.yaml       the resolved configuration, including the seed
metrics.jsonl     one line for every few steps and every evaluation
tensorboard/      the same for TensorBoard, and wandb/ for Weights & Biases, if `log.trackers` names them
mlperf.log        the MLPerf log
trace_*.json.gz   the steps of `--profile`
checkpoints/      the newest checkpoints, and posterior.pt, the posteriors of the final weights
predictions.csv   the validation set at the end: true and predicted parameters
summary.json      the results
posterior_scores.npz  what the posteriors say about each sample that they were scored on
report.html       the pictures
.lock             the process that trains, while it does; see `pipelines.distributed.locks`
"""

from __future__ import annotations

import io
import itertools
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import yaml

from cosmoflow_dali.compute.schedule import StepDecayConfig
from cosmoflow_dali.config import TrainConfig, flatten, read_yaml, resolve
from cosmoflow_dali.training.checkpoint import Checkpoint
from cosmoflow_dali.training.evaluation import Evaluation
from pipelines.dataset.dataset import SampleDataset
from pipelines.distributed.locks import locked
from pipelines.errors import ConfigError, DataError, writing, yaml_text
from pipelines.filesystem import is_empty
from pipelines.io import write_file
from pipelines.sample import PARAMETERS, to_physical

CONFIG = "config.yaml"
SUMMARY = "summary.json"
PREDICTIONS = "predictions.csv"
CHECKPOINTS = "checkpoints"

_GRACE = 5.0
"""Seconds for a process of the run that was killed to end: the system frees its memory first."""

MUTABLE_ON_RESUME = (
    "data.dir",
    "data.stage",
    "data.cache",
    "loader.",
    "log.checkpoint_every",
    "log.trackers",
    "submission.",
    "target_mae",
    "baseline",
    "device",
    "compute.engine",
    "compute.nvtx",
    "parallel.",
    "optimizer.implementation",
)
"""Settings, or prefixes of settings, that may change on resume because they do not affect the weights."""


@dataclass(frozen=True, slots=True)
class Run:
    """A new or resumed run; the same on all ranks.

    Args:
        folder: Folder of the run.
        config: Configuration; its seed is set.
        checkpoint: State to resume from, or None.
        train: Training samples.
        validation: Validation samples.
        fingerprints: `SampleDataset.fingerprint` of each split, of the samples in `data.dir`.
        seconds: Time spent so far by this process, by phase.
        kernels: Kernel of each block of the network on rank 0's GPU; see `choose_kernels`.
        calibration: Training samples that are kept from the network, for its posteriors; None without any.
        test: Samples to score the posteriors on; None if the data set has no test split.
        profile: Steps to record for a trace, counted from 1 on.
    """

    folder: Path
    config: TrainConfig
    checkpoint: Checkpoint | None
    train: SampleDataset
    validation: SampleDataset
    fingerprints: dict[str, list[str]]
    seconds: dict[str, float]
    kernels: list[str] = field(default_factory=list)
    calibration: SampleDataset | None = None
    test: SampleDataset | None = None
    profile: range = range(0)

    @property
    def seed(self) -> int:
        """Seed of every random draw."""
        assert self.config.seed is not None
        return self.config.seed


def lock_run(folder: Path) -> AbstractContextManager[int]:
    """Lock the run in `folder` for this process; raise DataError if another process has it."""

    def refuse(holder: str) -> NoReturn:
        remedy = "wait until it has ended, or name another --run-dir"
        raise DataError(folder, f"is in use by {holder}", remedy)

    return locked(folder, refuse, grace=_GRACE)


def create_run(run: Run, locks: ExitStack, *, must_be_new: bool) -> Run:
    """Make the folder of the new `run`, lock it in `locks`, and write config.yaml.

    Args:
        run: The run, with the folder that it is to have.
        locks: Keeps the lock of the folder.
        must_be_new: Take another name if the folder exists; otherwise it may exist and be empty.

    Returns:
        The run with the folder that it has.

    Raises:
        DataError: The folder is not empty, is in use, or cannot be written.
    """
    folder = run.folder
    with writing(folder):
        if must_be_new:
            folder = _make_new(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        locks.enter_context(lock_run(folder))
        # The lock is hidden, and so are temporary files of a process that was killed while it created a run.
        if not is_empty(folder):
            raise DataError(folder, "is not empty", "add --resume to resume its run, or name another folder")
        save_config(folder, run.config)
    return replace(run, folder=folder)


def _make_new(folder: Path) -> Path:
    """Make `folder`, or the first of `folder`-2, `folder`-3, ... that is not there; return its path."""
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not path.is_dir():
                raise  # One of its parents is a file.
    raise AssertionError("unreachable")


def save_config(folder: Path, config: TrainConfig) -> None:
    """Write `config` into `folder` as YAML."""
    write_file(folder / CONFIG, yaml.safe_dump(asdict(config), sort_keys=False).encode())


def resume_run(folder: Path, config: TrainConfig, ranks: int) -> tuple[TrainConfig, Checkpoint | None]:
    """Return `config` with the seed of the run in `folder`, and its newest checkpoint, if any.

    Raises:
        ConfigError: `config` differs from the run's in a setting that affects the weights, `ranks` do not
            keep its global batch, or the run has done more than `config.epochs`.
    """
    earlier = resolve(read_yaml(folder / CONFIG))
    if config.seed is None:
        config = replace(config, seed=earlier.seed)
    mutable = MUTABLE_ON_RESUME + (("epochs",) if isinstance(config.schedule, StepDecayConfig) else ())
    old, new = flatten(earlier), flatten(config)
    for key in old.keys() | new.keys():
        if old.get(key) != new.get(key) and (not key.startswith(mutable) or key == "loader.apply_log"):
            advice = f"the run in {folder} has {yaml_text(old.get(key))}; keep it, or start a new run"
            raise ConfigError(key, new.get(key), advice)
    checkpoint = Checkpoint.newest(folder / CHECKPOINTS)
    found = config.samples_per_step(ranks)
    if checkpoint is not None and checkpoint.global_batch != found:
        advice = (
            f"on {ranks} ranks, {config.parallel.spatial} to a sample, makes a global batch of {found}, and "
            f"the run's is {checkpoint.global_batch}; change one of them"
        )
        raise ConfigError("loader.batch_size", config.loader.batch_size, advice)
    if checkpoint is not None and (least := checkpoint.position.begun_epochs) > config.epochs:
        advice = (
            f"the run in {folder} has done {checkpoint.position}; give at least {least}, or start a new run"
        )
        raise ConfigError("epochs", config.epochs, advice)
    return config, checkpoint


def write_predictions(folder: Path, evaluation: Evaluation) -> None:
    """Write true and predicted parameters in physical units, one validation sample per line."""
    columns = [f"{parameter.name}_{kind}" for kind in ("true", "pred") for parameter in PARAMETERS]
    true, predicted = to_physical(evaluation.targets), to_physical(evaluation.predictions)
    table, header = np.column_stack([evaluation.index, true, predicted]), ",".join(["index", *columns])
    formats = ["%d", *("%.7g" for _ in columns)]
    text = io.BytesIO()
    np.savetxt(text, table, formats, ",", newline="\r\n", header=header, comments="")
    write_file(folder / PREDICTIONS, text.getbuffer())
