"""Errors of the runs of `crops_study`: averages over crops, standard errors, table and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmoflow_dali.reporting.plot_style import BLUE, INK, LIGHT_BLUE, ORANGE, SERIES, SYMBOLS, plot_style
from pipelines.sample import PARAMETERS
from pipelines.tables import format_table

Array = npt.NDArray[np.float64]

RESULT = "study.json"
"""File of a finished run with its CPU time."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Outputs of a run for a split, in units of the target.

    Args:
        outputs: (universes, samples of each, 4).
        targets: (universes, 4).
    """

    outputs: Array
    targets: Array


def predictions_path(folder: Path, data: str, split: str) -> Path:
    """Return the file of a run's outputs for `split` of the data set `data`: the fields of `Predictions`."""
    return folder / f"{data}-{split}.npz"


def load(folder: Path, data: str, split: str) -> Predictions:
    """Return the outputs of the run in `folder` for `split` of the data set `data`."""
    with np.load(predictions_path(folder, data, split)) as arrays:
        return Predictions(arrays["outputs"], arrays["targets"])


def average(split: Predictions) -> Array:
    """Return the average of the outputs for each universe, (universes, 4)."""
    return split.outputs.mean(axis=1)


def correct(validation: Predictions, test: Predictions) -> Array:
    """Return `average(test)` after the linear map that fits `validation` best, (universes, 4).

    The output for a crop lies closer to the centre of the prior than the average of eight should.
    """
    inputs = [np.column_stack([average(split), np.ones(len(split.targets))]) for split in (validation, test)]
    return inputs[1] @ np.linalg.lstsq(inputs[0], validation.targets, rcond=None)[0]


def errors(folders: Sequence[Path]) -> dict[str, Array]:
    """Return the absolute errors (seeds, universes, 4) on the test split of an arm's runs, by estimate.

    "one crop" is the error of a crop alone, averaged over those of a universe, "crops" that of the average
    over crops, and "box" that of the network applied to the whole box; "corrected" is after `correct`.
    """
    found: dict[str, list[Array]] = {}
    for folder in folders:
        for data in ("crops", "boxes"):
            if not predictions_path(folder, data, "test").exists():
                continue
            validation, test = (load(folder, data, split) for split in ("validation", "test"))
            name = "box" if data == "boxes" else data
            estimates = {name: average(test), f"{name}, corrected": correct(validation, test)}
            for estimate, values in estimates.items():
                found.setdefault(estimate, []).append(np.abs(values - test.targets))
            if data == "crops":
                alone = np.abs(test.outputs - test.targets[:, None]).mean(axis=1)
                found.setdefault("one crop", []).append(alone)
    return {name: np.stack(values) for name, values in found.items()}


def mean_and_error(values: Array) -> dict[str, Any]:
    """Return the mean of `values` (seeds, universes, 4) over seeds and universes, with standard errors.

    Entries 0 to 3 are the parameters, the last one is their average. `error` is the standard error over
    universes of the average over the seeds; `seeds` is each seed's mean over universes and parameters.
    """
    values = np.concatenate([values, values.mean(axis=2, keepdims=True)], axis=2)
    each = values.mean(axis=0)
    return {
        "mean": each.mean(axis=0).tolist(),
        "error": (each.std(axis=0, ddof=1) / np.sqrt(len(each))).tolist(),
        "seeds": values[..., -1].mean(axis=1).tolist(),
    }


def slopes(folders: Sequence[Path], data: str) -> list[float]:
    """Return for each parameter the slope of the truth as a line of the average output, averaged over runs.

    1 for the mean of the posterior given all samples of a universe; above 1 if outputs are too close to 0.
    """
    found = []
    for split in (load(folder, data, "test") for folder in folders):
        guesses, truths = (values - values.mean(axis=0) for values in (average(split), split.targets))
        # An untrained network may return a constant.
        found.append((guesses * truths).sum(axis=0) / np.maximum((guesses**2).sum(axis=0), 1e-12))
    return np.mean(found, axis=0).tolist()


def correlations(folders: Sequence[Path]) -> list[float]:
    """Return for each parameter the correlation between the errors for two crops of a universe."""
    found = []
    for split in (load(folder, "crops", "test") for folder in folders):
        errors = split.outputs - split.targets[:, None]
        pairs = np.triu_indices(errors.shape[1], 1)
        found.append([np.corrcoef(each.T)[pairs].mean() for each in np.moveaxis(errors, 2, 0)])
    return np.mean(found, axis=0).tolist()


def summarise(folders: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Return the mean absolute errors of each arm, and their differences from the averages over crops."""
    found = {name: errors(paths) for name, paths in folders.items()}
    result: dict[str, Any] = {}
    for name, estimates in found.items():
        figures = {estimate: mean_and_error(values) for estimate, values in estimates.items()}
        for end in ("", ", corrected"):
            if f"box{end}" in estimates and "crops" in found:
                difference = estimates[f"box{end}"] - found["crops"][f"crops{end}"]
                figures[f"box less crops{end}"] = mean_and_error(difference)
        seconds = [json.loads((path / RESULT).read_text())["cpu_seconds"] for path in folders[name]]
        result[name] = {"errors": figures, "cpu_seconds": seconds, "slopes": slopes(folders[name], name)}
    if "crops" in folders:
        result["crops"]["correlations"] = correlations(folders["crops"])
    return result


def show(universes: int, summary: Mapping[str, Any]) -> None:
    """Print the table of one number of universes."""
    heads = [f"{universes} universes", "", *(parameter.name for parameter in PARAMETERS), "all", "seeds"]
    rows = [heads]
    for name, figures in summary.items():
        for estimate, values in figures["errors"].items():
            pairs = zip(values["mean"], values["error"], strict=True)
            cells = [f"{mean:.4f} ± {error:.4f}" for mean, error in pairs]
            seeds = ", ".join(f"{value:.4f}" for value in values["seeds"])
            rows.append([name, estimate, *cells, seeds])
        shown = [quantity for quantity in ("slopes", "correlations") if quantity in figures]
        rows += [[name, key, *(f"{value:.3f}" for value in figures[key]), "", ""] for key in shown]
        seconds = ", ".join(f"{value:.0f}" for value in figures["cpu_seconds"])
        rows.append([name, "CPU seconds", "", "", "", "", "", seconds])
    print(format_table(rows, left=(0, 1)))


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the errors of each parameter, and by how much those of boxes differ from averages over crops."""
    crops, boxes = (summary[name]["errors"] for name in ("crops", "boxes"))
    errors_of = {
        "one crop": (crops["one crop"], LIGHT_BLUE),
        "average of 8 crops": (crops["crops"], BLUE),
        "the same, corrected": (crops["crops, corrected"], SERIES[3]),
        "box": (boxes["box"], ORANGE),
        "box, corrected": (boxes["box, corrected"], SERIES[2]),
    }
    differences = {
        "box less average of 8 crops": (boxes["box less crops"], ORANGE),
        "both corrected": (boxes["box less crops, corrected"], SERIES[2]),
    }
    with plot_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 3.8), layout="constrained", dpi=110)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        for axis, bars in ((left, errors_of), (right, differences)):
            width = 0.8 / len(bars)
            for number, (label, (values, colour)) in enumerate(bars.items()):
                at = np.arange(len(PARAMETERS) + 1) + width * (number - (len(bars) - 1) / 2)
                axis.bar(at, values["mean"], 0.95 * width, yerr=values["error"], color=colour, label=label)
            axis.set_xticks(range(len(PARAMETERS) + 1), [*SYMBOLS.values(), "all"])
            axis.legend()
        left.set_ylabel("mean absolute error, units of the target")
        right.set_ylabel("difference; below 0 the box is better")
        right.axhline(0, color=INK, linewidth=0.8)
        figure.savefig(path)
    print("drawn to", path)
