"""A folder as MLPerf HPC wants a submission, made of logs, and what the official checkers say of it.

The layout is what mlperf_logging.package_checker looks for: results/SYSTEM/strong/cosmoflow/result_N.txt
(or weak), systems/SYSTEM.json, and the code in benchmarks/cosmoflow.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmoflow_dali.mlperf.checkers import (
    Verdict,
    check_convergence,
    check_package,
    check_seeds,
    missing_fields,
)
from cosmoflow_dali.mlperf.parse_logs import BENCHMARK, Run
from cosmoflow_dali.mlperf.scoring import Score
from pipelines.errors import AccessError, DataError, UserError
from pipelines.io import read_file, write_chunks

_ROOT = Path(__file__).resolve().parents[2]
_CODE = (
    "cosmoflow_dali", "pipelines", "preprocess", "configs", "pyproject.toml", "constraints.txt", "Makefile",
    "Dockerfile", "init_datasets.sub", "run.sub", "run_and_time.sh", "README.md", "LICENSE",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Submission:
    """A folder that was laid out.

    verdicts: of the package, seed and reference-convergence checkers.
    notes: what is left to a person, and what the checkers were not asked.
    """

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]


def write_submission(folder: Path, scores: Sequence[Score]) -> Submission:
    """Lay `scores` out in `folder`, which must be empty or not there, and have them checked.

    Of weak scaling, the runs that do not count are left out, which the rules call pruning; strong ones
    are all there, since the rules let nobody choose among them.
    """
    _refuse(folder, scores)
    verdicts, notes = [], []
    for name in dict.fromkeys(_system_name(score) for score in scores):
        fields = _describe(folder, name, [score for score in scores if _system_name(score) == name])
        notes.append(f"systems/{name}.json: a person has to fill in {', '.join(fields)}")
    for score in scores:
        place = Path("results", _system_name(score), score.scaling, BENCHMARK)
        runs = score.runs if score.scaling == "strong" else score.valid_runs
        for number, run in enumerate(runs):
            write_chunks(_made(folder / place) / f"result_{number}.txt", read_file(run.path))
        verdicts.append(check_seeds(folder, place))
        if score.system.division == "closed":
            verdicts.append(check_convergence(folder, place))
        else:
            notes.append(f"{place}: reference convergence is asked of the closed division alone")
    notes += _add_code(folder, [run for score in scores for run in score.runs])
    return Submission((check_package(folder), *verdicts), tuple(notes))


def _refuse(folder: Path, scores: Sequence[Score]) -> None:
    """UserError where `scores` are no single submission or `folder` cannot take it."""
    if not scores:
        raise UserError("there is no run of CosmoFlow to submit; see the table")
    for what in ("org", "division"):
        values = sorted({getattr(score.system, what) for score in scores})
        if len(values) > 1:
            raise UserError(
                f"submission_{what}: the logs give {', '.join(values)}, and a submission has one; "
                "give the folder of one at a time"
            )
    places = [(_system_name(score), score.scaling) for score in scores]
    for system, scaling in places:
        if places.count((system, scaling)) > 1:
            raise UserError(
                f"submission_platform = {system!r}: its {scaling} runs differ in nodes, status or batch; "
                "give the folder of one kind of run at a time"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise AccessError.writing(folder, error) from error
    if not empty:
        raise DataError(folder, "is not empty", "name a new folder for the submission")


def _system_name(score: Score) -> str:
    """What the system is called in paths."""
    return re.sub(r"[^\w.+-]+", "_", score.system.platform).strip("._") or "unknown"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _describe(folder: Path, name: str, scores: Sequence[Score]) -> list[str]:
    """Write what the logs tell of the system `name`; the fields that they leave empty."""
    system = scores[0].system
    nodes = [
        score.system.nodes * (score.at_once if score.scaling == "weak" else 1)
        for score in scores
        if score.system.nodes is not None
    ]
    # All values are strings, since the checker joins them.
    description = {
        "submitter": system.org,
        "division": system.division,
        "status": system.status,
        "system_name": name,
        "number_of_nodes": str(max(nodes, default="")),
        "accelerators_per_node": str(system.accelerators_per_node),
    }
    path = _made(folder / "systems") / f"{name}.json"
    write_chunks(path, json.dumps(description).encode())
    missing = missing_fields(path)
    description |= dict.fromkeys(missing, "")
    write_chunks(path, json.dumps(description, indent=4).encode() + b"\n")
    return missing


def _add_code(folder: Path, runs: Sequence[Run]) -> list[str]:
    """Copy this program's code if it is what made the logs of `runs`; notes about what is missing."""
    place = Path("benchmarks", BENCHMARK, "implementations")
    ours = [not os.path.isabs(run.source) and (_ROOT / run.source).is_file() for run in runs if run.source]
    if not all(ours) or not ours:
        _made(folder / place)
        return [f"{place}: another program made these logs, and a person has to add its code"]
    target = _made(folder / place / "cosmoflow-dali")
    for part in _CODE:
        if (_ROOT / part).is_dir():
            shutil.copytree(_ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (_ROOT / part).is_file():
            shutil.copy(_ROOT / part, target / part)
    return [f"{target.relative_to(folder)}: a person has to add the configuration that ran"]
