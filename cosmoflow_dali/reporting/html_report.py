"""A run as one page: report.html, made of what else is in the run's folder and of nothing besides.

The pictures are inline SVG, so the file can be mailed or archived alone.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from cosmoflow_dali.reporting.plot_style import BLUE, INK, LIGHT_BLUE, ORANGE, STYLE
from cosmoflow_dali.training.logs import METRICS
from cosmoflow_dali.training.run_dir import CONFIG, PREDICTIONS, SUMMARY
from pipelines.io import write_chunks
from pipelines.sample import HALF_RANGE, PARAMETERS, Parameter

REPORT = "report.html"

_SYMBOLS = {"Omega_m": r"$\Omega_m$", "sigma_8": r"$\sigma_8$", "n_s": "$n_s$", "H_0": "$H_0$"}
_STYLE = STYLE | {
    "axes.edgecolor": "#8a8f9c",
    "axes.labelcolor": INK,
    # Text stays text: it can be searched, and the file stays small.
    "svg.fonttype": "none",
    # Fixed, so that the same run gives the same file.
    "svg.hashsalt": "cosmoflow-dali",
}
_WIDTH, _LEFT, _RIGHT, _BELOW, _ABOVE = 11.0, 0.75, 0.1, 0.5, 0.3
"""Of a picture and the margins for its labels, in inches; to find them, matplotlib would draw all twice."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2430; }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .9rem .2rem 0; text-align: right; }}
td:first-child, th:first-child, .facts td {{ text-align: left; }}
.facts td {{ vertical-align: top; }} .facts td:first-child {{ white-space: nowrap; color: #5b6170; }}
tr + tr td {{ border-top: 1px solid #e3e5ea; }}
thead th {{ border-bottom: 1px solid #8a8f9c; font-weight: 600; }}
svg {{ width: 100%; height: auto; font-family: system-ui, sans-serif; }}
pre {{ background: #f5f6f8; padding: 1rem; overflow-x: auto; }} p.note {{ color: #5b6170; }}
</style></head><body>
{body}
</body></html>
"""


def write_report(run: Path) -> Path:
    """Write report.html into the folder `run` of a finished run; its path."""
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    body = "\n".join(
        [
            f"<h1>{html.escape(run.resolve().name)}</h1>",
            f"<p class='note'>{html.escape(_headline(summary))}</p>",
            "<h2>Mean absolute error on the validation set</h2>",
            _scores(summary),
            "<p class='note'>In units of the target, whose range is [-1, 1]: 1 is a tenth of the parameter's "
            "mean. The root mean square is the standard error of one prediction in physical units, "
            "measured on this validation set.</p>",
            "<h2>Predicted against true</h2>",
            _picture(4, 2.9, lambda axes: _draw_predictions(axes, run / PREDICTIONS)),
            "<p class='note'>Each point is a validation sample; the circles are the mean prediction in "
            "eight equal bins of the truth. A network that has learned nothing lies on the dashed line, and "
            "where the data leave a parameter open, the least squared error lies between it and the "
            "diagonal: a slope below 1 is what an honest estimate shows there.</p>",
            "<h2>Training</h2>",
            _picture(3, 2.6, lambda axes: _draw_training(axes, records, summary)),
            "<h2>Where the time went</h2>",
            _picture(2, 2.4, lambda axes: _draw_time(axes, records, summary)),
            _facts(summary),
            "<h2>Configuration</h2>",
            f"<pre>{html.escape((run / CONFIG).read_text(encoding='utf-8'))}</pre>",
        ]
    )
    page = _PAGE.format(title=html.escape(f"CosmoFlow: {run.resolve().name}"), body=body)
    path = run / REPORT
    write_chunks(path, page.encode())
    return path


def _headline(summary: dict[str, Any]) -> str:
    rate = summary["samples_per_s"]
    return (
        f"{summary['epochs']} epochs, {summary['steps']} steps of {summary['global_batch']} samples on "
        f"{summary['ranks']} {'rank' if summary['ranks'] == 1 else 'ranks'}, seed {summary['seed']}"
        + (f"; {rate:.1f} samples/s" if rate else "")
        + f"; {summary['parameters']:,} parameters; outcome: {summary['outcome']}"
    )


def _scores(summary: dict[str, Any]) -> str:
    names = [parameter.name for parameter in PARAMETERS]
    rows = [["network", summary["mae"], *(summary["mae_per_parameter"][name] for name in names)]]
    if summary["baseline"]:
        baseline = summary["baseline"]
        rows.append([baseline["name"], baseline["mae"], *(baseline["mae_per_parameter"][n] for n in names)])
    trivial = summary["trivial_mae_per_parameter"]
    rows.append(["always the mean", summary["trivial_mae"], *(trivial[name] for name in names)])
    text = [[row[0], *(f"{value:.4f}" for value in row[1:])] for row in rows]
    rms = [
        f"{parameter.mean * HALF_RANGE * summary['residual_rms'][parameter.name]:.3g} {parameter.unit}"
        for parameter in PARAMETERS
    ]
    return _table(["", "all", *names], [*text, ["network, root mean square", "", *rms]])


def _facts(summary: dict[str, Any]) -> str:
    hardware, wait = summary["hardware"], summary["data_wait_fraction"]
    gpus = ", ".join(hardware["gpus"]) or "none"
    rows = [
        ["waiting for data, mean over ranks", f"{wait['mean']:.1%}"],
        ["waiting for data, worst rank", f"{wait['worst_rank']:.1%}"],
        ["processor", f"{hardware['cpu']}, {hardware['cores']} cores"],
        ["GPUs of a rank's node", gpus],
        ["memory", f"{hardware['memory'] / 2**30:.0f} GiB"],
        [
            "versions",
            ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        ],
    ]
    return f"<div class='facts'>{_table([], rows)}</div>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _picture(columns: int, height: float, draw: Callable[[list[Axes]], None]) -> str:
    """The SVG element of a row of axes that `draw` fills."""
    width = (_WIDTH - _RIGHT) / columns - _LEFT
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), dpi=150)
        figure.subplots_adjust(
            left=_LEFT / _WIDTH,
            right=1 - _RIGHT / _WIDTH,
            bottom=_BELOW / height,
            top=1 - _ABOVE / height,
            wspace=_LEFT / width,
        )
        draw(list(figure.subplots(1, columns)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_predictions(axes: list[Axes], path: Path) -> None:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for ax, parameter in zip(axes, PARAMETERS, strict=True):
        true, predicted = (
            np.array([float(row[f"{parameter.name}_{kind}"]) for row in rows]) for kind in ("true", "pred")
        )
        _draw_parameter(ax, parameter, true, predicted)


def _draw_parameter(ax: Axes, parameter: Parameter, true: Any, predicted: Any) -> None:
    low, high = (parameter.mean * (1 + sign * 1.25 * HALF_RANGE) for sign in (-1, 1))
    size = float(np.clip(2000 / len(true), 0.5, 6))
    # Points as pixels, for there may be 65,536 of them; the rest stays vector.
    ax.scatter(true, predicted, s=size, color=BLUE, alpha=0.5, linewidths=0, rasterized=True)
    ax.plot([low, high], [low, high], color=INK, lw=1)
    ax.axhline(parameter.mean, color=ORANGE, lw=1, ls="--")
    edges = parameter.mean * (1 + HALF_RANGE * np.linspace(-1, 1, 9))
    bins = np.digitize(true, edges) - 1
    filled = [b for b in range(8) if (bins == b).any()]
    ax.plot(
        [true[bins == b].mean() for b in filled],
        [predicted[bins == b].mean() for b in filled],
        "o",
        ms=4,
        color="white",
        mec=INK,
    )
    residual = predicted - true
    spread = float(np.square(true - true.mean()).sum())
    slope = float(((true - true.mean()) * predicted).sum()) / spread if spread else float("nan")
    r2 = 1 - float(np.square(residual).sum()) / spread if spread else float("nan")
    symbol, unit = _SYMBOLS[parameter.name], f" [{parameter.unit}]" if parameter.unit else ""
    rms = float(np.sqrt(np.square(residual).mean()))
    ax.set_title(f"{symbol}: rms {rms:.3g}, slope {slope:.2f}, R² {r2:.2f}", fontsize=9)
    ax.set(
        xlim=(low, high),
        ylim=(low, high),
        xlabel=f"true{unit}",
        ylabel=f"predicted{unit}",
        aspect="equal",
    )


def _draw_training(axes: list[Axes], records: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    steps = [record for record in records if record["kind"] == "step"]
    evals = [record for record in records if record["kind"] == "eval"]
    per_epoch = summary["steps"] / max(summary["epochs"], 1)
    at = [record["step"] / per_epoch for record in steps]
    axes[0].plot(at, [record["loss"] for record in steps], color=BLUE, lw=1, label="training")
    at_eval = [record["step"] / per_epoch for record in evals]
    axes[0].plot(at_eval, [record["mse"] for record in evals], "o-", color=ORANGE, ms=4, label="validation")
    axes[0].set(xlabel="epoch", ylabel="mean squared error", yscale="log")
    # As powers of ten, which are set in mathematics, the labels would take as long as all else.
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("")
    axes[0].legend()
    for parameter, color in zip(PARAMETERS, (BLUE, ORANGE, "#5b9a4f", "#8661a6"), strict=True):
        values = [record["mae_per_parameter"][parameter.name] for record in evals]
        axes[1].plot(at_eval, values, "o-", color=color, ms=3, lw=1, label=_SYMBOLS[parameter.name])
    axes[1].plot(at_eval, [record["mae"] for record in evals], "o-", color=INK, ms=4, lw=2, label="all")
    axes[1].axhline(summary["trivial_mae"], color=INK, lw=1, ls="--")
    axes[1].annotate("always the mean", (0.02, summary["trivial_mae"]), va="bottom", fontsize=8,
                     xycoords=("axes fraction", "data"))  # fmt: skip
    axes[1].set(xlabel="epoch", ylabel="validation MAE")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(ncols=2, fontsize=8)
    axes[2].plot(at, [record["lr"] for record in steps], color=BLUE, lw=1)
    axes[2].set(xlabel="epoch", ylabel="learning rate")


def _draw_time(axes: list[Axes], records: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    steps = [record for record in records if record["kind"] == "step"]
    per_epoch = summary["steps"] / max(summary["epochs"], 1)
    at = np.array([record["step"] / per_epoch for record in steps])
    wait = np.array([record["data_wait_ms"] for record in steps])
    whole = np.array([record["step_ms"] for record in steps])
    axes[0].stackplot(
        at, wait, whole - wait, labels=["data wait", "compute"], colors=[ORANGE, LIGHT_BLUE], lw=0
    )
    axes[0].set(xlabel="epoch", ylabel="ms a step", ylim=(0, 1.35 * whole.max()))
    axes[0].legend(loc="upper right", ncols=2)
    phases = {name: seconds for name, seconds in summary["seconds"].items() if seconds}
    axes[1].barh(list(phases), list(phases.values()), color=LIGHT_BLUE)
    for row, seconds in enumerate(phases.values()):
        axes[1].annotate(f" {seconds:.1f} s", (seconds, row), va="center", fontsize=8)
    axes[1].invert_yaxis()
    axes[1].margins(x=0.15)
    axes[1].set(xlabel="seconds")
