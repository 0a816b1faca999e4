"""Shift of posteriors between two data sets, such as universes of the same seeds made in other steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from cosmoflow_dali.posterior.fitted import TITLES, Features, number_universes
from cosmoflow_dali.reporting.posteriors import Scores
from pipelines.sample import PARAMETERS


def measure_shift(
    first: Features, first_scores: Scores, second: Features, second_scores: Scores
) -> dict[str, Any] | None:
    """Compare the posteriors of samples that have the same name and target in both sets.

    Returns:
        For programs: the numbers of pairs and of independent universes among them; and for each posterior
        but the prior, and each parameter, the mean of (mean of the second posterior - mean of the first) /
        standard deviation of the first, with its standard error. None if there are no pairs.
    """
    places = {name: at for at, name in enumerate(second.ids)}
    pairs = [
        (at, places[name])
        for at, name in enumerate(first.ids)
        if name in places and (first.targets[at] == second.targets[places[name]]).all()
    ]
    if not pairs:
        return None
    one, other = np.transpose(pairs)
    universes = len(np.unique(number_universes([first.ids[at] for at in one])))
    posteriors = {}
    for name, scores in first_scores.items():
        if name == "prior":
            continue
        moved = (second_scores[name].means[other] - scores.means[one]) / scores.deviations[one]
        errors = moved.std(axis=0) / np.sqrt(universes)
        posteriors[name] = {
            parameter.name: {"shift": float(shift), "standard_error": float(error)}
            for parameter, shift, error in zip(PARAMETERS, moved.mean(axis=0), errors, strict=True)
        }
    return {"pairs": len(pairs), "universes": universes, "posteriors": posteriors}


def shift_table(shift: dict[str, Any]) -> list[list[str]]:
    """Return a table of the result of `measure_shift`: titles, then a row for each posterior."""
    rows = [["shift in standard deviations", *(parameter.name for parameter in PARAMETERS)]]
    for name, each in shift["posteriors"].items():
        cells = [f"{of['shift']:+.3f} ± {of['standard_error']:.3f}" for of in each.values()]
        rows.append([TITLES[name], *cells])
    return rows
