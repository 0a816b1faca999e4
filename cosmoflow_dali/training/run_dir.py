"""A run's folder: making one, going on with one, and what is in it at the end.

config.yaml       the resolved configuration, its seed included
metrics.jsonl     a line for every few steps and every evaluation
mlperf.log        the MLPerf log
checkpoints/      the newest few
predictions.csv   the validation set at the end: true and predicted parameters
summary.json      the figures
report.html       the pictures
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from cosmoflow_dali.compute.schedule import StepDecayConfig
from cosmoflow_dali.config import TrainConfig, flatten, read_yaml, resolve
from cosmoflow_dali.training.checkpoint import Checkpoint
from cosmoflow_dali.training.evaluation import Evaluation
from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import ConfigError, DataError
from pipelines.io import TEMPORARY_SUFFIX, write_chunks
from pipelines.plan import plan_epoch
from pipelines.sample import PARAMETERS, to_physical

CONFIG = "config.yaml"
SUMMARY = "summary.json"
PREDICTIONS = "predictions.csv"
CHECKPOINTS = "checkpoints"

_FREE = (
    "data.dir",
    "data.stage",
    "loader.",
    "log.checkpoint_every",
    "submission.",
    "target_mae",
    "baseline",
    "device",
    "compute.engine",
    "compute.nvtx",
    "optimizer.implementation",
)
"""Settings, or their beginnings, that may change on resume: they move no weight."""


def begin(folder: Path, config: TrainConfig) -> None:
    """Make `folder` for a new run of `config`; DataError if a run is there already."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a run that was killed while it began has left is no run.
        if any(not path.name.endswith(TEMPORARY_SUFFIX) for path in folder.iterdir()):
            raise DataError(folder, "is not empty", "add --resume to go on with its run, or name another")
        save_config(folder, config)
    except OSError as error:
        raise DataError(folder, f"cannot be written ({error.strerror})", "name another --run-dir") from error


def save_config(folder: Path, config: TrainConfig) -> None:
    """Write `config` into `folder` as YAML."""
    text = yaml.safe_dump(asdict(config), sort_keys=False)
    write_chunks(folder / CONFIG, text.encode())


def load_config(folder: Path) -> TrainConfig:
    """The configuration that the run in `folder` started with."""
    return resolve(read_yaml(folder / CONFIG))


def go_on(folder: Path, config: TrainConfig, ranks: int) -> tuple[TrainConfig, Checkpoint | None]:
    """`config` with the seed of the run in `folder`, and the run's newest checkpoint if it has one.

    ConfigError where `config` differs from the run's in something that would change the weights, or
    where `ranks` do not keep its global batch.
    """
    earlier = load_config(folder)
    if config.seed is None:
        config = replace(config, seed=earlier.seed)
    free = _FREE + (("epochs",) if isinstance(config.schedule, StepDecayConfig) else ())
    before, now = flatten(earlier), flatten(config)
    for key in before.keys() | now.keys():
        if before.get(key) != now.get(key) and (not key.startswith(free) or key == "loader.apply_log"):
            raise ConfigError(
                key,
                now.get(key),
                f"the run in {folder} has {before.get(key)!r}; keep it, or start a new run",
            )
    checkpoint = Checkpoint.newest(folder / CHECKPOINTS)
    if checkpoint is not None and checkpoint.global_batch != config.loader.batch_size * ranks:
        raise ConfigError(
            "loader.batch_size",
            config.loader.batch_size,
            f"times {ranks} ranks is not the run's global batch of {checkpoint.global_batch}; "
            "change one of them",
        )
    return config, checkpoint


def check_data(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    ranks: int,
    train: SampleDataset,
    validation: SampleDataset,
) -> None:
    """UserError unless the splits fit the network, the ranks, and the run that `checkpoint` is of."""
    batch, wanted = config.loader.batch_size, config.global_batch
    if wanted is not None and wanted != batch * ranks:
        raise ConfigError(
            "global_batch",
            wanted,
            f"{ranks} ranks with loader.batch_size {batch} make {batch * ranks}, and the learning rates are "
            "meant for this; change the ranks or --batch-size",
        )
    plan_epoch(
        len(train),
        global_batch=batch * ranks,
        seed=0,
        epoch=0,
        shuffle=False,
        ragged="drop",
    )
    for split in (train, validation):
        if split.spec.size != config.model.size:
            raise ConfigError(
                "model.size",
                config.model.size,
                f"the samples in {split.root} are {split.spec.size} voxels wide",
            )
    if checkpoint is not None and checkpoint.train_samples != len(train):
        raise ConfigError(
            "data.dir",
            config.data.dir,
            f"has {len(train)} training samples, and the run started with {checkpoint.train_samples}",
        )


def check_shares(checkpoint: Checkpoint | None, train: SampleDataset) -> None:
    """ConfigError unless the nodes have `train` in the shares that they had in the run of `checkpoint`."""
    if checkpoint is not None and checkpoint.division != train.partition_signature:
        said = f"the run was trained on {checkpoint.division}, which decides its order; stage as then"
        raise ConfigError("data.stage", train.partition_signature, said)


def write_predictions(folder: Path, evaluation: Evaluation) -> None:
    """Write true and predicted parameters, in physical units, one validation sample a line."""
    names = [parameter.name for parameter in PARAMETERS]
    rows = zip(to_physical(evaluation.targets), to_physical(evaluation.predictions), strict=True)
    with open(folder / PREDICTIONS, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", *(f"{name}_true" for name in names), *(f"{name}_pred" for name in names)])
        for index, (true, predicted) in zip(evaluation.index.tolist(), rows, strict=True):
            writer.writerow([index, *(f"{value:.7g}" for value in (*true, *predicted))])


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json."""
    text = json.dumps(summary, indent=2) + "\n"
    write_chunks(folder / SUMMARY, text.encode())
