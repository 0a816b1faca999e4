"""Score MLPerf logs as a submission to MLPerf HPC does.

    python -m cosmoflow_dali.results LOGDIR [--ruleset ROUND] [--submission DIR] [--plot FILE] [--json FILE]

LOGDIR holds MLPerf logs at any depth: run folders of this trainer, or logs of any program. The official
compliance checker checks each log, by the rules of the round that was open when it was written. A table lists
all logs, and a second one the scores of each system with published results. The exit status is 0 if all logs
are compliant and their runs converged.
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

from cosmoflow_dali.mlperf.checkers import RULESETS, USAGE
from cosmoflow_dali.mlperf.parse_logs import BENCHMARK, Run, read_logs
from cosmoflow_dali.mlperf.published import ROWS
from cosmoflow_dali.mlperf.read_events import TARGET_MAE
from cosmoflow_dali.mlperf.scoring import Score, summarize
from cosmoflow_dali.reporting.plot_style import BLUE, INK, LIGHT_BLUE, ORANGE, plot_style
from pipelines.console import check_output, print_line
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World
from pipelines.errors import UserError
from pipelines.filesystem import provide_scratch, refuse_input
from pipelines.output import write_output
from pipelines.tables import format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_PUBLISHED = [row for row in ROWS if row.version >= "v2.0"]
"""Rounds with today's scores."""

_MAX_ERRORS = 5
"""Compliance errors printed per log."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    with report_errors(World()):
        text = "Check the MLPerf logs of many runs and print the scores that a submission reports."
        parser = OneLineParser("cosmoflow_dali.results", text)
        parser.add_argument("logdir", type=Path, metavar="LOGDIR", help="folder with MLPerf logs, any depth")
        text = "check all logs by the rules of this round (default: by the time of each log)"
        parser.add_argument("--ruleset", choices=RULESETS, help=text)
        text = "write a submission to this folder and check it"
        parser.add_argument("--submission", type=Path, metavar="DIR", help=text)
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the runs")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
        arguments = parser.parse_args(argv)
        runs = read_logs(arguments.logdir, arguments.ruleset)
        for output in filter(None, (arguments.json, arguments.plot)):
            refuse_input(output, [run.path for run in runs])
        scores = summarize(runs)
        print(format_table(_log_rows(runs), left=(0, 8)))
        for run in runs:
            for error in run.compliance_errors[:_MAX_ERRORS]:
                print_line(f"{run.name}: fails compliance: {error}")
            if (more := len(run.compliance_errors) - _MAX_ERRORS) > 0:
                print_line(f"{run.name}: fails compliance: {more} more errors")
        print("\n" + format_table(_score_rows(scores)))
        for note in _notes(scores):
            print_line(f"note: {note}")
        if arguments.json is not None:
            figures = json.dumps(_tree(runs, scores), indent=2).encode() + b"\n"
            write_output(arguments.json, lambda file: file.write(figures))
        if arguments.plot is not None:
            provide_scratch(arguments.plot.parent)
            picture = draw(scores)
            write_output(arguments.plot, lambda file: file.write(picture))
        failed = _submit(arguments.submission, scores) if arguments.submission is not None else 0
        check_output()
        invalid = [run.name for run in runs if not run.is_valid]
        if invalid:
            raise UserError(f"{len(invalid)} of {len(runs)} logs are invalid: {invalid[0]}; see the table")
        if failed:
            raise UserError(f"{arguments.submission}: {failed} checkers fail; see their messages above")
    return 0


def _submit(folder: Path, scores: Sequence[Score]) -> int:
    """Write the submission and print the verdicts; return the number of checkers that fail."""
    # Imported here because the convergence checker imports scipy, which is slow.
    from cosmoflow_dali.mlperf.submission import write_submission

    verdicts, notes = write_submission(folder, scores)
    print()
    print_line(f"wrote {folder}")
    for verdict in verdicts:
        print_line(f"{verdict.checker}, {verdict.subject}: {'passes' if verdict.passed else 'fails'}")
        for message in verdict.messages:
            print_line(f"  {message}")
    for note in notes:
        print_line(f"note: {note}")
    return sum(not verdict.passed for verdict in verdicts)


def _log_rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = [
        ["log", "compliance", "minutes", "epochs", "samples/s each", "staging, s", "accelerators", "seed", ""]
    ]
    for run in runs:
        verdict, outcome = ("fails", "not compliant") if run.compliance_errors else ("passes", "converged")
        if run.ruleset != RULESETS[-1]:
            verdict = f"{verdict} {run.ruleset}" if run.ruleset else "no rules"
        accelerators = run.system.accelerators if run.system else None
        figures = run.minutes, run.epochs, run.rate, run.staging, accelerators, run.seed
        texts = map(_text, figures, (3, 0, 1, 1, 0, 0))
        rows.append([run.name, verdict, *texts, "; ".join(run.invalid_reasons) or outcome])
    return rows


def _score_rows(scores: Sequence[Score]) -> list[list[str]]:
    """Return the rows of `scores`, followed by the published results."""
    rows = [
        [
            "result", "scaling", "runs", "accelerators", "samples/s each", "minutes", "staging, s", "epochs",
            "TTTa, min", "models/min",
        ]
    ]  # fmt: skip
    for score in scores:
        each, title = score.system.accelerators, f"{score.system.org}, {score.system.platform}"
        models = f"{score.at_once} x {each} = {score.at_once * each}" if each and score.at_once > 1 else ""
        rate, staging, epochs = (score.mean(figure) for figure in ("rate", "staging", "epochs"))
        last = score.time_to_train_all, score.models_per_minute
        figures = _score_figures(rate, score.time_to_train, staging, epochs, *last)
        valid = f"{len(score.valid_runs)} of {len(score.runs)}"
        rows.append([title, score.scaling, valid, models or _text(each, 0), *figures])
    for row in _PUBLISHED:
        last = row.whole, row.models_per_minute
        figures = _score_figures(row.rate, row.minutes, row.staging, row.epochs, *last)
        if row.counted:
            figures[2] = "included"
        rows.append([f"published: {row.submission}", row.scaling, "", row.accelerators, *figures])
    return rows


def _score_figures(*values: float | None) -> list[str]:
    """Format rate, minutes, staging, epochs, TTTa and models per minute."""
    return list(map(_text, values, (1, 2, 1, 1, 2, 2)))


def _notes(scores: Sequence[Score]) -> list[str]:
    """Return the definitions of the figures, and what a submission would need in addition."""
    notes = [
        "minutes: from run_start to run_stop, the mean without the fastest and the slowest run",
        f"epochs: to the first validation error of at most {TARGET_MAE}; samples/s: of training alone",
    ]
    required = get_result_file_counts(USAGE)[BENCHMARK]
    for score in scores:
        name = f"{score.system.org}, {score.system.platform}, {score.scaling}"
        count = len(score.valid_runs)
        if count < required or (score.scaling == "strong" and count > required):
            notes.append(f"{name}: {count} valid runs; a submission has {required}")
        seeds = defaultdict(list)
        for run in score.runs:
            seeds[run.seed].append(run.name)
        for seed, names in seeds.items():
            if len(names) > 1 and seed is not None:
                notes.append(f"{name}: {' and '.join(names)} share seed {seed}; each run needs its own")
    return notes


def _tree(runs: Sequence[Run], scores: Sequence[Score]) -> dict[str, Any]:
    """Return all figures for JSON."""
    return {
        "logs": [_run_tree(run) for run in runs],
        "results": [
            asdict(score)
            | {"runs": [run.name for run in score.runs]}
            | {f"mean_{figure}": score.mean(figure) for figure in ("rate", "staging", "epochs")}
            for score in scores
        ],
        "published": [asdict(row) for row in _PUBLISHED],
    }


def _run_tree(run: Run) -> dict[str, Any]:
    tree = asdict(run) | {"path": str(run.path), "minutes": run.minutes, "content": None}
    # The keys of earlier versions.
    errors, reasons = tree.pop("compliance_errors"), tree.pop("invalid_reasons")
    return tree | {"complaints": errors, "faults": reasons, "counts": run.is_valid}


def draw(scores: Sequence[Score]) -> bytes:
    """Return a PNG picture of each score's runs over time."""
    with plot_style():
        # Imported here because matplotlib is slow to import, and most calls draw nothing.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3 * max(1, len(scores))), layout="constrained", dpi=150)
        for number, score in enumerate(scores, 1):
            _draw_runs(figure.add_subplot(len(scores), 1, number), score)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_runs(ax: Axes, score: Score) -> None:
    """Draw each run as a bar from its own start or, for weak scaling, from the first run's start."""
    first = min((run.start for run in score.valid_runs if run.start is not None), default=0.0)
    for row, run in enumerate(score.runs):
        if run.start is None or run.minutes is None:
            continue
        start = (run.start - first) / 60 if score.scaling == "weak" else 0.0
        ax.barh(row, run.minutes, left=start, color=BLUE if run.is_valid else ORANGE, height=0.7)
        if run.staging is not None and run.staging_start is not None:
            left = start + (run.staging_start - run.start) / 60
            ax.barh(row, run.staging / 60, left=left, color=LIGHT_BLUE, height=0.7)
    line, name = (
        (score.time_to_train_all, "TTTa") if score.scaling == "weak" else (score.time_to_train, "mean")
    )
    if line is not None:
        ax.axvline(line, color=INK, lw=1, ls="--")
    ax.set_title(f"{score.system.org}, {score.system.platform}: {len(score.runs)} runs", fontsize=9)
    # Bars pin the limits of the axes, which would clip staging at the frame.
    ax.use_sticky_edges = False
    ax.margins(x=0.03)
    ax.set(xlabel=f"minutes (light: staging, orange: invalid, dashed: {name})", yticks=[])
    ax.set_ylim(max(len(score.runs), 4) - 0.5, -0.5)


def _text(value: float | None, digits: int) -> str:
    # A seed may have more digits than a float.
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
