"""Results of a finished run, on rank 0: predictions, baseline, summary and report."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from cosmoflow_dali.reporting import ridge_baseline, system_info
from cosmoflow_dali.reporting.html_report import write_report
from cosmoflow_dali.reporting.posteriors import score_table, verdicts
from cosmoflow_dali.reporting.scores import score_rows
from cosmoflow_dali.training.evaluation import Evaluation
from cosmoflow_dali.training.run_dir import SUMMARY, Run, write_predictions
from pipelines.distributed.world import World
from pipelines.io import write_file
from pipelines.loading.reader import Reader
from pipelines.tables import format_table

logger = logging.getLogger(__name__)


def write_results(
    run: Run,
    evaluation: Evaluation,
    training: dict[str, Any],
    posterior: dict[str, Any] | None,
    world: World,
) -> dict[str, Any]:
    """Write predictions.csv, summary.json and report.html into the folder of `run`, and log the scores.

    Args:
        evaluation: Validation of the final weights.
        training: Entries of summary.json about the training.
        posterior: Its entry about the posteriors, if there are any.

    Returns:
        The content of summary.json.
    """
    config, seconds = run.config, dict(training["seconds"])
    write_predictions(run.folder, evaluation)
    baseline = None
    if config.baseline:
        start, loader = time.perf_counter(), config.loader
        # The same samples as the network's.
        readers = (
            Reader(split, loader.on_bad_sample, apply_log=loader.apply_log)
            for split in (run.train, run.validation)
        )
        ridge = ridge_baseline.fit_ridge(*readers)
        baseline = {
            "name": ridge_baseline.NAME,
            "mae": ridge.mae,
            "mae_per_parameter": ridge.mae_per_parameter,
        }
        seconds["baseline"] = time.perf_counter() - start
    if posterior is not None:
        seconds["posterior"] = sum(posterior["seconds"].values())
    global_batch, trivial = config.samples_per_step(world.size), evaluation.trivial_mae_per_parameter
    summary = {
        **evaluation.scores(),
        "trivial_mae": float(np.mean(list(trivial.values()))),
        "trivial_mae_per_parameter": trivial,
        "residual_rms": evaluation.residual_rms,
        "baseline": baseline,
        "posterior": posterior,
        **training,
        "target_mae": config.target_mae,
        "seed": config.seed,
        "global_batch": global_batch,
        "ranks": world.size,
        "ranks_per_sample": config.parallel.spatial,
        "samples_per_s": training["steps"] * global_batch / seconds["train"] if seconds["train"] else None,
        "seconds": seconds,
        "versions": system_info.versions(),
        "hardware": system_info.hardware(),
    }
    write_file(run.folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    _write_report(run.folder)
    rows = score_rows(summary, baseline_title="ridge")
    for line in format_table([["validation MAE", "all", *trivial], *rows]).splitlines():
        logger.info(line)
    if posterior is not None:
        logger.info("posteriors of the %d samples in %s:", posterior["samples"], posterior["split"])
        for line in (*format_table(score_table(posterior["scores"])).splitlines(), *verdicts(posterior)):
            logger.info(line)
    return summary


def _write_report(folder: Path) -> None:
    """Write report.html if matplotlib is installed."""
    start = time.perf_counter()
    try:
        report = write_report(folder)
    except ImportError:
        logger.info("no report: matplotlib is not installed")
        return
    logger.info("report %s (%.0f s)", report, time.perf_counter() - start)
