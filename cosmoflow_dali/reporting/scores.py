"""Table of the scores in a run's summary."""

from __future__ import annotations

from typing import Any


def score_rows(summary: dict[str, Any], baseline_title: str) -> list[list[str]]:
    """Return rows of title, MAE, and MAE per parameter: the network, the baseline, and always the mean."""
    scores = [("network", summary["mae"], summary["mae_per_parameter"])]
    if baseline := summary["baseline"]:
        scores.append((baseline_title, baseline["mae"], baseline["mae_per_parameter"]))
    scores.append(("always the mean", summary["trivial_mae"], summary["trivial_mae_per_parameter"]))
    return [[title, *(f"{value:.4f}" for value in (mae, *each.values()))] for title, mae, each in scores]
