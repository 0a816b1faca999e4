"""Write report.html, one page about a run, from the other files in the run's folder.

The pictures are inline SVG, so the file can be mailed or archived alone.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmoflow_dali.posterior.fitted import TITLES
from cosmoflow_dali.reporting.plot_style import (
    BLUE,
    INK,
    LIGHT_BLUE,
    ORANGE,
    SERIES,
    SYMBOLS,
    svg_picture,
)
from cosmoflow_dali.reporting.posterior_plots import (
    draw_calibration,
    draw_corner,
    draw_ranks,
    read_scored,
)
from cosmoflow_dali.reporting.posteriors import SCORES, score_table, verdicts
from cosmoflow_dali.reporting.scores import score_rows
from cosmoflow_dali.training.logs import METRICS
from cosmoflow_dali.training.run_dir import CONFIG, PREDICTIONS, SUMMARY
from pipelines.errors import printable
from pipelines.io import write_file
from pipelines.sample import HALF_RANGE, PARAMETERS, Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT = "report.html"

_PAGE_STYLE = """
body { font-family: sans-serif; max-width: 62rem; margin: 2rem auto; }
table { border-spacing: 1rem 0; text-align: left; }
svg { width: 100%; height: auto; }
.failed { color: #a01c1c; font-weight: bold; }
"""


def write_report(run: Path) -> Path:
    """Write report.html into the folder `run` of a finished run; return its path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    for record in records:
        record["epochs"] = record["step"] * max(summary["epochs"], 1) / summary["steps"]
    steps, evals = ([each for each in records if each["kind"] == kind] for kind in ("step", "eval"))
    name, config = printable(run.resolve().name), (run / CONFIG).read_text(encoding="utf-8")
    page = f"""<!doctype html>
<meta charset="utf-8">
<title>CosmoFlow: {html.escape(name)}</title>
<style>{_PAGE_STYLE}</style>
<h1>{html.escape(name)}</h1>
<p>{html.escape(_headline(summary))}</p>
{_posterior_headline(summary.get("posterior"))}
<h2>Mean absolute error on the validation set</h2>
{_table(_score_table(summary))}
<p>In units of the target, whose range is [-1, 1]: 1 is a tenth of the parameter's mean. The root mean square
is the standard error of one prediction in physical units, measured on this validation set.</p>
<h2>Predicted against true</h2>
{svg_picture(4, 2.9, lambda axes: _draw_predictions(axes, run / PREDICTIONS))}
<p>Each point is a validation sample; the circles are the mean prediction in eight equal bins of the truth. A
network that has learned nothing lies on the dashed line. If the data leave a parameter uncertain, the
prediction with the least squared error lies between that line and the diagonal, so a slope below 1 is
expected.</p>
{_posterior_section(summary.get("posterior"), run / SCORES)}
<h2>Training</h2>
{svg_picture(3, 2.6, lambda axes: _draw_training(axes, steps, evals, summary["trivial_mae"]))}
<h2>Time</h2>
{svg_picture(2, 2.4, lambda axes: _draw_time(axes, steps, summary["seconds"]))}
{_table(_facts(summary))}
<h2>Configuration</h2>
<pre>{html.escape(config)}</pre>
"""
    path = run / REPORT
    write_file(path, page.encode())
    return path


def _headline(summary: dict[str, Any]) -> str:
    rate, ranks = summary["samples_per_s"], summary["ranks"]
    # Summaries of earlier versions have none.
    shared = summary.get("ranks_per_sample", 1)
    return (
        f"{summary['epochs']} epochs, {summary['steps']} steps of {summary['global_batch']} samples on "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'}"
        + (f", each sample cut over {shared} of them" if shared > 1 else "")
        + f", seed {summary['seed']}"
        + (f"; {rate:.1f} samples/s" if rate else "")
        + f"; {summary['parameters']:,} parameters; outcome: {summary['outcome']}"
    )


def _score_table(summary: dict[str, Any]) -> list[list[str]]:
    baseline = summary["baseline"]
    rms = [
        f"{parameter.mean * HALF_RANGE * summary['residual_rms'][parameter.name]:.3g} {parameter.unit}"
        for parameter in PARAMETERS
    ]
    return [
        ["", "all", *(parameter.name for parameter in PARAMETERS)],
        *score_rows(summary, baseline["name"] if baseline else ""),
        ["network, root mean square", "", *rms],
    ]


def _facts(summary: dict[str, Any]) -> list[list[str]]:
    hardware, wait = summary["hardware"], summary["data_wait_fraction"]
    return [
        ["waiting for data, mean over ranks", f"{wait['mean']:.1%}"],
        ["waiting for data, worst rank", f"{wait['worst_rank']:.1%}"],
        *_transfers(summary.get("transfers")),
        ["processor", f"{hardware['cpu']}, {hardware['cores']} cores"],
        ["GPUs per node", ", ".join(hardware["gpus"]) or "none"],
        ["memory", f"{hardware['memory'] / 2**30:.0f} GiB"],
        ["versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())],
    ]


def _transfers(counts: dict[str, int] | None) -> list[list[str]]:
    """Return the rows about requests for remote samples; none if there were none, as in earlier versions."""
    if counts is None:
        return []
    sent = f"{counts['requests']:,}, {counts['bytes'] / 1e9:.2f} GB"
    again = f"{counts['retries']:,} ({counts['throttled']:,} of a busy server), {counts['raced']:,} raced"
    hits = f"{counts['cache_hits']:,}, {counts['cache_bytes'] / 1e9:.2f} GB"
    return [["requests for data", sent], ["requests repeated", again], ["reads from the node's cache", hits]]


def _posterior_headline(posterior: dict[str, Any] | None) -> str:
    """Return a paragraph that says whether the run's best posterior is calibrated; none without any."""
    if posterior is None:
        return ""
    best = posterior["best"]
    text = (
        f"Posterior from {TITLES[best]}, {posterior['split']} samples: {posterior['scores'][best]['verdict']}"
    )
    return _verdict(text)


def _verdict(text: str) -> str:
    """Return a paragraph with a posterior's verdict, marked if it is not calibrated."""
    failed = "not calibrated" in text or "not independent" in text
    return f"<p{' class=failed' if failed else ''}>{html.escape(text)}</p>"


def _posterior_section(posterior: dict[str, Any] | None, path: Path) -> str:
    """Return the section about the run's posteriors, drawn from `path`; none without any."""
    if posterior is None:
        return ""
    best = posterior["best"]
    scored, fit = read_scored(path, best, posterior["universes"]), posterior["fit_samples"]
    unseen = (
        "which neither training nor the fit has seen"
        if posterior["split"] == "test"
        else "as the data set has no test split: training is stopped and judged by them"
    )
    return f"""<h2>Posteriors</h2>
{_table(score_table(posterior["scores"]))}
<p>Scored on {posterior["samples"]:,} {posterior["split"]} samples of {posterior["universes"]:,} universes,
{unseen}. Fitted to the summaries of {fit["summaries"]:,} samples, and to the outputs of the network for
{fit["network"]:,} that it was not trained on. MAE is that of the posterior mean, in units of the target;
NLL is the mean negative log-likelihood of the truth, in nats; the last columns are the shares of the truths
in the central intervals, for the worst and the best parameter.</p>
{"".join(map(_verdict, verdicts(posterior)))}
<p>The prior is calibrated but says nothing: TARP alone, whose points depend on the data, tells it from a
posterior that uses them.</p>
<p>The pictures show the posterior from {TITLES[best]}. Shaded bands are three standard deviations of a
perfect posterior.</p>
{svg_picture(4, 2.2, lambda axes: draw_ranks(axes, scored))}
<p>The rank of the truth among the draws. Even if calibrated; a hump means that the posteriors are too wide, a
valley too narrow, a slope biased.</p>
{svg_picture(3, 3.2, lambda axes: draw_calibration(axes, scored))}
<p>Left: coverage of the central intervals. Middle: the same for the regions of TARP, around a point that
depends on the data, for all parameters together. Right: errors of the posterior means of samples with similar
predicted widths, in units of the target; the dashed line is where both are equal.</p>
{svg_picture(4, 9, lambda axes: draw_corner(axes, scored), rows=4)}
<p>Posteriors of {len(scored.draws)} samples, a colour each: 68% and 95% contours of their draws, smoothed,
over the range of the prior. Crosses and dotted lines mark the truth.</p>"""


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return "<table>" + "\n".join(lines) + "</table>"


def _draw_predictions(axes: list[Axes], path: Path) -> None:
    table = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
    for ax, parameter in zip(axes, PARAMETERS, strict=True):
        _draw_parameter(ax, parameter, table[f"{parameter.name}_true"], table[f"{parameter.name}_pred"])


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
    # Without a spread of the truth there is neither a slope nor an R².
    mse, spread = np.square(predicted - true).mean(), true.var() or np.nan
    slope = np.cov(true, predicted, bias=True)[0, 1] / spread
    symbol, unit = SYMBOLS[parameter.name], f" [{parameter.unit}]" if parameter.unit else ""
    ax.set_title(f"{symbol}: rms {mse**0.5:.3g}, slope {slope:.2f}, R² {1 - mse / spread:.2f}", fontsize=8)
    limits = (low, high)
    ax.set(xlim=limits, ylim=limits, xlabel=f"true{unit}", ylabel=f"predicted{unit}", aspect="equal")


def _draw_training(
    axes: list[Axes], steps: list[dict[str, Any]], evals: list[dict[str, Any]], trivial_mae: float
) -> None:
    at, at_eval = _column(steps, "epochs"), _column(evals, "epochs")
    axes[0].plot(at, _column(steps, "loss"), color=BLUE, lw=1, label="training")
    axes[0].plot(at_eval, _column(evals, "mse"), "o-", color=ORANGE, ms=4, label="validation")
    axes[0].set(xlabel="epoch", ylabel="mean squared error", yscale="log")
    axes[0].legend()
    for parameter, color in zip(PARAMETERS, SERIES, strict=True):
        values = [mae[parameter.name] for mae in _column(evals, "mae_per_parameter")]
        axes[1].plot(at_eval, values, "o-", color=color, ms=3, lw=1, label=SYMBOLS[parameter.name])
    axes[1].plot(at_eval, _column(evals, "mae"), "o-", color=INK, ms=4, lw=2, label="all")
    axes[1].axhline(trivial_mae, color=INK, lw=1, ls="--", label="always the mean")
    axes[1].set(xlabel="epoch", ylabel="validation MAE")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(ncols=2, fontsize=8)
    axes[2].plot(at, _column(steps, "lr"), color=BLUE, lw=1)
    axes[2].set(xlabel="epoch", ylabel="learning rate")


def _draw_time(axes: list[Axes], steps: list[dict[str, Any]], phases: dict[str, float]) -> None:
    wait, total = np.array(_column(steps, "data_wait_ms")), np.array(_column(steps, "step_ms"))
    at, colors = _column(steps, "epochs"), [ORANGE, LIGHT_BLUE]
    axes[0].stackplot(at, wait, total - wait, labels=["data wait", "compute"], colors=colors)
    axes[0].set(xlabel="epoch", ylabel="ms per step", ylim=(0, 1.35 * max(total, default=1.0)))
    axes[0].legend(loc="upper right", ncols=2)
    phases = {name: seconds for name, seconds in phases.items() if seconds}
    bars = axes[1].barh(list(phases), list(phases.values()), color=LIGHT_BLUE)
    axes[1].bar_label(bars, fmt=" %.1f s", fontsize=8)
    axes[1].invert_yaxis()
    axes[1].margins(x=0.15)
    axes[1].set(xlabel="seconds")


def _column(records: list[dict[str, Any]], key: str) -> list[Any]:
    return [record[key] for record in records]
