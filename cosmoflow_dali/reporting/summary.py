"""The end of a run, on rank 0: predictions, baseline, summary and report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cosmoflow_dali.config import TrainConfig
from cosmoflow_dali.reporting import ridge_baseline, system_info
from cosmoflow_dali.training import run_dir as runs
from cosmoflow_dali.training.evaluation import Evaluation
from cosmoflow_dali.training.logs import Console
from cosmoflow_dali.training.trainer import Outcome
from pipelines.dataset.dataset import SampleDataset
from pipelines.distributed.world import World
from pipelines.loading.reader import Reader
from pipelines.tables import format_table


@dataclass(frozen=True, slots=True)
class Result:
    """How training ended.

    evaluation: of the weights at the end.
    skipped: how many damaged samples of each split were passed over.
    epochs, steps: of the whole run, whatever process made them.
    compute_summary: the optimizer, the engine and the precision.
    parameters: trainable weights of the network.
    wait_fractions: for each rank, the share of its training time spent waiting for data.
    seconds: by phase.
    """

    outcome: Outcome
    evaluation: Evaluation
    skipped: dict[str, int]
    epochs: int
    steps: int
    compute_summary: str
    parameters: int
    wait_fractions: list[float]
    seconds: dict[str, float]


def finish(
    folder: Path,
    config: TrainConfig,
    result: Result,
    train: SampleDataset,
    validation: SampleDataset,
    world: World,
    console: Console,
) -> None:
    """Leave in `folder` what a person wants to see of the run, and say the figures.

    train, validation: the splits with all their samples, not a node's share of them.
    """
    evaluation, seconds = result.evaluation, dict(result.seconds)
    runs.write_predictions(folder, evaluation)
    compared: dict[str, Any] | None = None
    if config.baseline:
        start = time.perf_counter()
        policy = config.loader.on_bad_sample
        ridge = ridge_baseline.fit_ridge(Reader(train, policy), Reader(validation, policy))
        seconds["baseline"] = time.perf_counter() - start
        compared = {
            "name": ridge_baseline.NAME,
            "mae": ridge.mae,
            "mae_per_parameter": ridge.mae_per_parameter,
        }
    global_batch = config.loader.batch_size * world.size
    trivial = evaluation.trivial_mae_per_parameter
    summary = {
        **evaluation.scores(),
        "trivial_mae": float(np.mean(list(trivial.values()))),
        "trivial_mae_per_parameter": trivial,
        "residual_rms": evaluation.residual_rms,
        "baseline": compared,
        "skipped_samples": result.skipped,
        "outcome": result.outcome.value,
        "target_mae": config.target_mae,
        "seed": config.seed,
        "epochs": result.epochs,
        "steps": result.steps,
        "global_batch": global_batch,
        "ranks": world.size,
        "computes": result.compute_summary,
        "parameters": result.parameters,
        "samples_per_s": result.steps * global_batch / seconds["train"] if seconds["train"] else None,
        "data_wait_fraction": {
            "mean": float(np.mean(result.wait_fractions)),
            "worst_rank": max(result.wait_fractions),
        },
        "seconds": seconds,
        "versions": system_info.versions(),
        "hardware": system_info.hardware(),
    }
    runs.write_summary(folder, summary)
    _report(folder, console)
    _say_scores(console, summary)


def _report(folder: Path, console: Console) -> None:
    """Write the report, or say that there is none."""
    start = time.perf_counter()
    try:
        # Only here: matplotlib takes a third of the program's start, and only rank 0 draws.
        from cosmoflow_dali.reporting.html_report import write_report
    except ImportError:
        console.say("no report: this Python lacks matplotlib")
        return
    report = write_report(folder)
    console.say(f"report {report} ({time.perf_counter() - start:.0f} s)")


def _say_scores(console: Console, summary: dict[str, Any]) -> None:
    """A small table: each parameter's MAE beside the trivial predictor's and the baseline's."""
    names = list(summary["mae_per_parameter"])
    scores = [("network", summary["mae"], summary["mae_per_parameter"])]
    if baseline := summary["baseline"]:
        scores.append(("ridge", baseline["mae"], baseline["mae_per_parameter"]))
    scores.append(("always the mean", summary["trivial_mae"], summary["trivial_mae_per_parameter"]))
    rows = [
        [title, *(f"{value:.4f}" for value in (mae, *(each[name] for name in names)))]
        for title, mae, each in scores
    ]
    for line in format_table([["validation MAE", "all", *names], *rows]).splitlines():
        console.say(line)
