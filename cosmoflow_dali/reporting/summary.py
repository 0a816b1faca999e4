"""Results of a finished run, on rank 0: predictions, baseline, summary and report."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cosmoflow_dali.reporting import ridge_baseline, system_info
from cosmoflow_dali.reporting.scores import score_rows
from cosmoflow_dali.training.evaluation import Evaluation
from cosmoflow_dali.training.run_dir import Run, write_predictions, write_summary
from cosmoflow_dali.training.trainer import StopReason
from pipelines.distributed.world import World
from pipelines.loading.reader import Reader
from pipelines.tables import format_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Result of training.

    Args:
        reason: Reason for the end of training.
        evaluation: Validation of the final weights.
        skipped: Number of damaged samples of each split that were skipped.
        epochs: Epochs of the whole run, over all of its processes.
        steps: Steps of the whole run.
        compute_summary: Optimizer, engine and precision.
        parameters: Number of trainable weights.
        wait_fractions: For each rank, the fraction of its training time spent waiting for data.
        seconds: Time by phase.
    """

    reason: StopReason
    evaluation: Evaluation
    skipped: dict[str, int]
    epochs: int
    steps: int
    compute_summary: str
    parameters: int
    wait_fractions: list[float]
    seconds: dict[str, float]


def write_results(run: Run, result: TrainingResult, world: World) -> None:
    """Write predictions.csv, summary.json and report.html into the folder of `run`, and log the scores."""
    config, evaluation, seconds = run.config, result.evaluation, dict(result.seconds)
    write_predictions(run.folder, evaluation)
    start = time.perf_counter()
    baseline = _fit_baseline(run) if config.baseline else None
    if baseline:
        seconds["baseline"] = time.perf_counter() - start
    global_batch = config.loader.batch_size * world.size
    trivial, waits = evaluation.trivial_mae_per_parameter, result.wait_fractions
    summary = {
        **evaluation.scores(),
        "trivial_mae": float(np.mean(list(trivial.values()))),
        "trivial_mae_per_parameter": trivial,
        "residual_rms": evaluation.residual_rms,
        "baseline": baseline,
        "skipped_samples": result.skipped,
        "outcome": result.reason.value,
        "target_mae": config.target_mae,
        "seed": config.seed,
        "epochs": result.epochs,
        "steps": result.steps,
        "global_batch": global_batch,
        "ranks": world.size,
        "computes": result.compute_summary,
        "parameters": result.parameters,
        "samples_per_s": result.steps * global_batch / seconds["train"] if seconds["train"] else None,
        "data_wait_fraction": {"mean": float(np.mean(waits)), "worst_rank": max(waits)},
        "seconds": seconds,
        "versions": system_info.versions(),
        "hardware": system_info.hardware(),
    }
    write_summary(run.folder, summary)
    _write_report(run.folder)
    names = list(summary["mae_per_parameter"])
    rows = score_rows(summary, baseline_title="ridge")
    for line in format_table([["validation MAE", "all", *names], *rows]).splitlines():
        logger.info(line)


def _fit_baseline(run: Run) -> dict[str, Any]:
    """Return the name and the scores of the ridge regression."""
    policy = run.config.loader.on_bad_sample
    ridge = ridge_baseline.fit_ridge(Reader(run.train, policy), Reader(run.validation, policy))
    return {"name": ridge_baseline.NAME, "mae": ridge.mae, "mae_per_parameter": ridge.mae_per_parameter}


def _write_report(folder: Path) -> None:
    """Write report.html if matplotlib is installed."""
    start = time.perf_counter()
    try:
        # matplotlib takes a third of the program's start-up time, and only rank 0 needs it.
        from cosmoflow_dali.reporting.html_report import write_report
    except ImportError:
        logger.info("no report: matplotlib is not installed")
        return
    report = write_report(folder)
    logger.info("report %s (%.0f s)", report, time.perf_counter() - start)
