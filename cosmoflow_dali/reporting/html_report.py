"""Write report.html, one page about a run, from the other files in the run's folder.

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
from cosmoflow_dali.reporting.scores import score_rows
from cosmoflow_dali.training.logs import METRICS
from cosmoflow_dali.training.run_dir import CONFIG, PREDICTIONS, SUMMARY
from pipelines.io import write_chunks
from pipelines.sample import HALF_RANGE, PARAMETERS, Parameter

REPORT = "report.html"

_SYMBOLS = {"Omega_m": r"$\Omega_m$", "sigma_8": r"$\sigma_8$", "n_s": "$n_s$", "H_0": "$H_0$"}
_STYLE = STYLE | {
    "axes.edgecolor": "#8a8f9c",
    "axes.labelcolor": INK,
    # Text remains searchable text, and the file small.
    "svg.fonttype": "none",
    # A fixed salt, so that the same run gives the same file.
    "svg.hashsalt": "cosmoflow-dali",
}
_WIDTH, _LEFT, _RIGHT, _BELOW, _ABOVE = 11.0, 0.75, 0.1, 0.5, 0.3
"""Width of a picture and margins for its labels, in inches: matplotlib would draw twice to measure them."""

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
    """Write report.html into the folder `run` of a finished run; return its path."""
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    name, config = run.resolve().name, (run / CONFIG).read_text(encoding="utf-8")
    body = f"""<h1>{html.escape(name)}</h1>
<p class='note'>{html.escape(_headline(summary))}</p>
<h2>Mean absolute error on the validation set</h2>
{_scores(summary)}
<p class='note'>In units of the target, whose range is [-1, 1]: 1 is a tenth of the parameter's mean. The root
mean square is the standard error of one prediction in physical units, measured on this validation set.</p>
<h2>Predicted against true</h2>
{_picture(4, 2.9, lambda axes: _draw_predictions(axes, run / PREDICTIONS))}
<p class='note'>Each point is a validation sample; the circles are the mean prediction in eight equal bins of
the truth. A network that has learned nothing lies on the dashed line. If the data leave a parameter
uncertain, the prediction with the least squared error lies between that line and the diagonal, so a slope
below 1 is expected.</p>
<h2>Training</h2>
{_picture(3, 2.6, lambda axes: _draw_training(axes, records, summary))}
<h2>Time</h2>
{_picture(2, 2.4, lambda axes: _draw_time(axes, records, summary))}
{_facts(summary)}
<h2>Configuration</h2>
<pre>{html.escape(config)}</pre>"""
    path = run / REPORT
    write_chunks(path, _PAGE.format(title=html.escape(f"CosmoFlow: {name}"), body=body).encode())
    return path


def _headline(summary: dict[str, Any]) -> str:
    rate, ranks = summary["samples_per_s"], summary["ranks"]
    return (
        f"{summary['epochs']} epochs, {summary['steps']} steps of {summary['global_batch']} samples on "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'}, seed {summary['seed']}"
        + (f"; {rate:.1f} samples/s" if rate else "")
        + f"; {summary['parameters']:,} parameters; outcome: {summary['outcome']}"
    )


def _scores(summary: dict[str, Any]) -> str:
    names, baseline = [parameter.name for parameter in PARAMETERS], summary["baseline"]
    rows = score_rows(summary, baseline["name"] if baseline else "")
    rms = [
        f"{parameter.mean * HALF_RANGE * summary['residual_rms'][parameter.name]:.3g} {parameter.unit}"
        for parameter in PARAMETERS
    ]
    return _table(["", "all", *names], [*rows, ["network, root mean square", "", *rms]])


def _facts(summary: dict[str, Any]) -> str:
    hardware, wait = summary["hardware"], summary["data_wait_fraction"]
    rows = [
        ["waiting for data, mean over ranks", f"{wait['mean']:.1%}"],
        ["waiting for data, worst rank", f"{wait['worst_rank']:.1%}"],
        ["processor", f"{hardware['cpu']}, {hardware['cores']} cores"],
        ["GPUs per node", ", ".join(hardware["gpus"]) or "none"],
        ["memory", f"{hardware['memory'] / 2**30:.0f} GiB"],
        ["versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())],
    ]
    return f"<div class='facts'>{_table([], rows)}</div>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(header, 'th')}</thead><tbody>{body}</tbody></table>"


def _picture(columns: int, height: float, draw: Callable[[list[Axes]], None]) -> str:
    """Return the SVG element of a row of axes that `draw` fills."""
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
    # There may be 65,536 points: draw them as pixels and the rest as vectors.
    ax.scatter(true, predicted, s=size, color=BLUE, alpha=0.5, linewidths=0, rasterized=True)
    ax.plot([low, high], [low, high], color=INK, lw=1)
    ax.axhline(parameter.mean, color=ORANGE, lw=1, ls="--")
    bins = np.digitize(true, parameter.mean * (1 + HALF_RANGE * np.linspace(-1, 1, 9))) - 1
    means = [(true[bins == b].mean(), predicted[bins == b].mean()) for b in range(8) if (bins == b).any()]
    ax.plot(*zip(*means, strict=True), "o", ms=4, color="white", mec=INK)
    residual = predicted - true
    spread = float(np.square(true - true.mean()).sum())
    slope = float(((true - true.mean()) * predicted).sum()) / spread if spread else float("nan")
    r2 = 1 - float(np.square(residual).sum()) / spread if spread else float("nan")
    symbol, unit = _SYMBOLS[parameter.name], f" [{parameter.unit}]" if parameter.unit else ""
    rms = float(np.sqrt(np.square(residual).mean()))
    ax.set_title(f"{symbol}: rms {rms:.3g}, slope {slope:.2f}, R² {r2:.2f}", fontsize=9)
    limits = (low, high)
    ax.set(xlim=limits, ylim=limits, xlabel=f"true{unit}", ylabel=f"predicted{unit}", aspect="equal")


def _draw_training(axes: list[Axes], records: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    steps, evals = _by_kind(records, "step"), _by_kind(records, "eval")
    at, at_eval = _epochs(steps, summary), _epochs(evals, summary)
    axes[0].plot(at, [record["loss"] for record in steps], color=BLUE, lw=1, label="training")
    axes[0].plot(at_eval, [record["mse"] for record in evals], "o-", color=ORANGE, ms=4, label="validation")
    axes[0].set(xlabel="epoch", ylabel="mean squared error", yscale="log")
    # Powers of ten are typeset as mathematics, which takes as long as everything else on the page.
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("")
    axes[0].legend()
    for parameter, color in zip(PARAMETERS, (BLUE, ORANGE, "#5b9a4f", "#8661a6"), strict=True):
        values = [record["mae_per_parameter"][parameter.name] for record in evals]
        axes[1].plot(at_eval, values, "o-", color=color, ms=3, lw=1, label=_SYMBOLS[parameter.name])
    axes[1].plot(at_eval, [record["mae"] for record in evals], "o-", color=INK, ms=4, lw=2, label="all")
    axes[1].axhline(summary["trivial_mae"], color=INK, lw=1, ls="--")
    corner = (0.02, summary["trivial_mae"])
    axes[1].annotate("always the mean", corner, va="bottom", fontsize=8, xycoords=("axes fraction", "data"))
    axes[1].set(xlabel="epoch", ylabel="validation MAE")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(ncols=2, fontsize=8)
    axes[2].plot(at, [record["lr"] for record in steps], color=BLUE, lw=1)
    axes[2].set(xlabel="epoch", ylabel="learning rate")


def _draw_time(axes: list[Axes], records: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    steps = _by_kind(records, "step")
    wait, total = (np.array([record[key] for record in steps]) for key in ("data_wait_ms", "step_ms"))
    colors = [ORANGE, LIGHT_BLUE]
    axes[0].stackplot(
        _epochs(steps, summary), wait, total - wait, labels=["data wait", "compute"], colors=colors, lw=0
    )
    axes[0].set(xlabel="epoch", ylabel="ms per step", ylim=(0, 1.35 * total.max()))
    axes[0].legend(loc="upper right", ncols=2)
    phases = {name: seconds for name, seconds in summary["seconds"].items() if seconds}
    axes[1].barh(list(phases), list(phases.values()), color=LIGHT_BLUE)
    for row, seconds in enumerate(phases.values()):
        axes[1].annotate(f" {seconds:.1f} s", (seconds, row), va="center", fontsize=8)
    axes[1].invert_yaxis()
    axes[1].margins(x=0.15)
    axes[1].set(xlabel="seconds")


def _by_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def _epochs(records: list[dict[str, Any]], summary: dict[str, Any]) -> list[float]:
    """Return the position of each record in epochs."""
    return [record["step"] * max(summary["epochs"], 1) / summary["steps"] for record in records]
