"""What a submission to MLPerf HPC reports, from the logs of its runs.

    python -m cosmoflow_dali.results LOGDIR [--submission DIR] [--plot FILE.png] [--json FILE]

LOGDIR holds MLPerf logs at any depth: run folders of this trainer, or logs of anyone's. Each log is
checked by the official compliance checker; a table names every one of them, and what the runs come to is
printed beside published results. Exits with 0 if all logs pass and their runs converged.
"""

from __future__ import annotations

import io
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperf_logging.benchmark_meta import get_result_file_counts

from cosmoflow_dali.mlperf.checkers import USAGE
from cosmoflow_dali.mlperf.events import TARGET_MAE
from cosmoflow_dali.mlperf.parse_logs import BENCHMARK, Run, read_logs
from cosmoflow_dali.mlperf.published import ROWS
from cosmoflow_dali.mlperf.scoring import Score, summarize
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.session import World
from pipelines.errors import UserError
from pipelines.io import write_chunks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_PUBLISHED = [row for row in ROWS if row.version >= "v2.0"]
"""Of the rounds whose scores are the ones that are reported today."""

_SHOWN = 5
"""Lines of what is wrong with each log."""

_INK, _RUN, _STAGING, _OUT = "#1f2430", "#2f6db5", "#a9c3e2", "#c25a2a"
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    with report_errors(World()):
        parser = OneLineParser(
            prog="python -m cosmoflow_dali.results",
            description="Check the MLPerf logs of many runs and print what a submission reports of them.",
        )
        parser.add_argument("logdir", type=Path, metavar="LOGDIR", help="holds MLPerf logs, at any depth")
        parser.add_argument(
            "--submission", type=Path, metavar="DIR", help="lay a submission out here and have it checked"
        )
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the runs")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
        arguments = parser.parse_args(argv)
        runs = read_logs(arguments.logdir)
        scores = summarize(runs)
        print(_table(_log_rows(runs)))
        for run in runs:
            for complaint in _shortened(run.compliance_errors):
                print(f"{run.name}: fails compliance: {complaint}")
        print("\n" + _table(_result_rows(scores)))
        for note in _notes(scores):
            print(f"note: {note}")
        if arguments.json is not None:
            write_chunks(arguments.json, json.dumps(_tree(runs, scores), indent=2).encode() + b"\n")
        if arguments.plot is not None:
            write_chunks(arguments.plot, draw(scores))
        refused = _submit(arguments.submission, scores) if arguments.submission is not None else 0
        out = [run.name for run in runs if not run.is_valid]
        if out:
            raise UserError(f"{len(out)} of {len(runs)} logs do not count, such as {out[0]}; see the table")
        if refused:
            raise UserError(f"{arguments.submission}: {refused} checkers refuse it; see what they say")
    return 0


def _submit(folder: Path, scores: Sequence[Score]) -> int:
    """Write the submission and print what the checkers say of it; how many refuse it."""
    # Only here: the convergence checker brings scipy, which takes its time.
    from cosmoflow_dali.mlperf.submission import write_submission

    submission = write_submission(folder, scores)
    print(f"\nwrote {folder}")
    for verdict in submission.verdicts:
        print(f"{verdict.checker}, {verdict.of}: {'passes' if verdict.passed else 'fails'}")
        for reason in verdict.messages:
            print(f"  {reason}")
    for note in submission.notes:
        print(f"note: {note}")
    return sum(not verdict.passed for verdict in submission.verdicts)


def _shortened(compliance_errors: Sequence[str]) -> list[str]:
    more = len(compliance_errors) - _SHOWN
    return [*compliance_errors[:_SHOWN], *([f"{more} more of these"] if more > 0 else [])]


def _log_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = [
        ["log", "compliance", "minutes", "epochs", "samples/s each", "staging, s", "accelerators", "seed", ""]
    ]
    rows += [
        [
            run.name,
            "fails" if run.compliance_errors else "passes",
            _text(run.minutes, 3),
            _text(run.epochs),
            _text(run.rate, 1),
            _text(run.staging, 1),
            _text(run.system.accelerators if run.system else None),
            _text(run.seed),
            "; ".join(run.invalid_reasons) or ("does not count" if run.compliance_errors else "converged"),
        ]
        for run in runs
    ]
    return rows


def _result_rows(scores: Sequence[Score]) -> list[list[str]]:
    """These results, and below them what others have published."""
    rows = [
        [
            "result", "scaling", "runs", "accelerators", "samples/s each", "minutes", "staging, s", "epochs",
            "TTTa, min", "models/min",
        ]
    ]  # fmt: skip
    for score in scores:
        each = score.system.accelerators
        models = f"{score.at_once} x {each} = {score.at_once * each}" if each and score.at_once > 1 else ""
        rows.append(
            [
                f"{score.system.org}, {score.system.platform}",
                score.scaling,
                f"{len(score.valid_runs)} of {len(score.runs)}",
                models or _text(each),
                _text(score.mean("rate"), 1),
                _text(score.time_to_train, 2),
                _text(score.mean("staging"), 1),
                _text(score.mean("epochs"), 1),
                _text(score.time_to_train_all, 2),
                _text(score.models_per_minute, 2),
            ]
        )
    rows += [
        [
            f"published: {one.submission}",
            one.scaling,
            "",
            one.accelerators,
            _text(one.rate, 1),
            _text(one.minutes, 2),
            "included" if one.counted else _text(one.staging, 1),
            _text(one.epochs, 1),
            _text(one.whole, 2),
            _text(one.models_per_minute, 2),
        ]
        for one in _PUBLISHED
    ]
    return rows


def _notes(scores: Sequence[Score]) -> list[str]:
    """What the figures are, and what keeps them from being a submission's."""
    notes = [
        "minutes: from run_start to run_stop, the mean without the fastest and the slowest run",
        f"epochs: to the first validation error of at most {TARGET_MAE}; samples/s: of training alone",
    ]
    wanted = get_result_file_counts(USAGE)[BENCHMARK]
    for score in scores:
        name = f"{score.system.org}, {score.system.platform}, {score.scaling}"
        count = len(score.valid_runs)
        if count < wanted or (score.scaling == "strong" and count > wanted):
            notes.append(f"{name}: runs that count: {count}; a submission has {wanted}")
        seeds = defaultdict(list)
        for run in score.runs:
            seeds[run.seed].append(run.name)
        for seed, names in seeds.items():
            if len(names) > 1 and seed is not None:
                notes.append(f"{name}: {' and '.join(names)} share the seed {seed}; each wants its own")
    return notes


def _tree(runs: Sequence[Run], scores: Sequence[Score]) -> dict[str, Any]:
    """All figures, as JSON has them."""
    return {
        "logs": [_run_tree(run) for run in runs],
        "results": [
            asdict(score)
            | {"runs": [run.name for run in score.runs]}
            | {f"mean_{figure}": score.mean(figure) for figure in ("rate", "staging", "epochs")}
            for score in scores
        ],
        "published": [asdict(one) for one in _PUBLISHED],
    }


def _run_tree(run: Run) -> dict[str, Any]:
    tree = asdict(run) | {
        "path": str(run.path),
        "minutes": run.minutes,
        "counts": run.is_valid,
        "content": None,
    }
    tree["complaints"], tree["faults"] = tree.pop("compliance_errors"), tree.pop("invalid_reasons")
    return tree


def draw(scores: Sequence[Score]) -> bytes:
    """A PNG picture: of each result its runs in time, and its score beside the published ones."""
    # Only here: matplotlib takes its time, and most calls draw nothing.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    heights = [1.6 + 0.14 * len(score.runs) for score in scores] or [1.0]
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, sum(heights)), layout="constrained", dpi=150)
        axes = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights, width_ratios=(2, 1))
        for (left, right), score in zip(axes, scores, strict=False):
            _draw_runs(left, score)
            _draw_scores(right, score)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_runs(ax: Axes, score: Score) -> None:
    """Each run as a bar: from its own start, or, where models are trained together, from the first one's."""
    first = min((run.start for run in score.valid_runs if run.start is not None), default=0.0)
    for row, run in enumerate(score.runs):
        if run.start is None or run.minutes is None:
            continue
        began = (run.start - first) / 60 if score.scaling == "weak" else 0.0
        ax.barh(row, run.minutes, left=began, color=_RUN if run.is_valid else _OUT, height=0.7)
        if run.staging is not None and run.staging_start is not None:
            left = began + (run.staging_start - run.start) / 60
            ax.barh(row, run.staging / 60, left=left, color=_STAGING, height=0.7)
    line, name = (
        (score.time_to_train_all, "TTTa") if score.scaling == "weak" else (score.time_to_train, "the mean")
    )
    if line is not None:
        ax.axvline(line, color=_INK, lw=1, ls="--")
    ax.set_title(f"{score.system.org}, {score.system.platform}: {len(score.runs)} runs", fontsize=9)
    # Bars hold the axes' edges, which would cut staging off from the frame.
    ax.use_sticky_edges = False
    ax.margins(x=0.03)
    ax.set(xlabel=f"minutes (light: staging, orange: does not count, dashed: {name})", yticks=[])
    ax.set_ylim(max(len(score.runs), 4) - 0.5, -0.5)


def _draw_scores(ax: Axes, score: Score) -> None:
    others = [one for one in _PUBLISHED if one.scaling == score.scaling]
    if score.scaling == "strong":
        label, own = "time to train [min]", score.time_to_train
        theirs: list[tuple[str, float | None]] = [(one.submission, one.minutes) for one in others]
    else:
        label, own = "models a minute", score.models_per_minute
        theirs = [(one.submission, one.models_per_minute) for one in others]
    bars = [("these runs", own, _RUN), *((name, value, _STAGING) for name, value in theirs)]
    for row, (_, value, color) in enumerate(bars):
        ax.barh(row, value or 0, color=color, height=0.7)
        ax.annotate(f" {_text(value, 2)}", (value or 0, row), va="center", fontsize=8)
    ax.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    # No taller than a few of the runs beside them.
    ax.set_ylim(max(len(bars), len(score.runs) / 4) - 0.5, -0.5)
    ax.margins(x=0.2)
    ax.set(xlabel=label)


def _text(value: float | None, digits: int = 0) -> str:
    # A seed may have more digits than a float.
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` in columns: the first and the last flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
