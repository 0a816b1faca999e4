"""A submission folder for MLPerf HPC, made from logs, and the official checkers' verdicts on it.

mlperf_logging.package_checker expects results/SYSTEM/strong/cosmoflow/result_N.txt (or weak),
systems/SYSTEM.json, and the code in benchmarks/cosmoflow.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cosmoflow_dali.mlperf import checkers
from cosmoflow_dali.mlperf.checkers import Verdict
from cosmoflow_dali.mlperf.parse_logs import BENCHMARK, Run
from cosmoflow_dali.mlperf.scoring import Score
from pipelines.errors import DataError, UserError, writing
from pipelines.filesystem import find_files, is_empty, is_present
from pipelines.io import read_file, write_file

_ROOT = Path(__file__).resolve().parents[2]
_CODE = (
    "cosmoflow_dali", "pipelines", "preprocess", "configs", "pyproject.toml", "constraints.txt", "Makefile",
    "Dockerfile", "init_datasets.sub", "run.sub", "run_and_time.sh", "README.md", "LICENSE",
)  # fmt: skip


def write_submission(folder: Path, scores: Sequence[Score]) -> tuple[list[Verdict], list[str]]:
    """Write `scores` to `folder`, which must be empty or missing, and run the checkers on it.

    Invalid runs of weak scaling are left out, which the rules call pruning. Strong ones are all included,
    because the rules do not allow a choice among them.

    Returns:
        The verdicts of the package, seed and reference-convergence checkers, and notes on what a person has
        to complete and what was not checked.

    Raises:
        UserError: `scores` are not one submission, or `folder` cannot be used.
    """
    ruleset = _check(folder, scores)
    verdicts, notes = [], []
    for name in dict.fromkeys(score.system.folder_name for score in scores):
        fields = _write_system(
            folder, name, [score for score in scores if score.system.folder_name == name], ruleset
        )
        notes.append(f"systems/{name}.json: fill in {', '.join(fields)}")
    for score in scores:
        subject = Path("results", score.system.folder_name, score.scaling, BENCHMARK)
        runs = score.runs if score.scaling == "strong" else score.valid_runs
        for number, run in enumerate(runs):
            write_file(_made(folder / subject) / f"result_{number}.txt", read_file(run.path))
        verdicts.append(checkers.check_seeds(folder, subject, ruleset))
        if score.system.division == "closed":
            verdicts.append(checkers.check_convergence(folder, subject, ruleset))
        else:
            notes.append(f"{subject}: reference convergence is checked in the closed division only")
    notes.append(_add_code(folder, [run for score in scores for run in score.runs]))
    return [checkers.check_package(folder, ruleset), *verdicts], notes


def _check(folder: Path, scores: Sequence[Score]) -> str:
    """Return the ruleset of the submission; raise UserError if `scores` are not one."""
    if not scores:
        raise UserError("there is no run of CosmoFlow to submit; see the table")
    for field in ("org", "division"):
        values = sorted({getattr(score.system, field) for score in scores})
        if len(values) > 1:
            raise UserError(
                f"submission_{field}: the logs have {', '.join(values)}, but a submission has one; "
                "give the folder of one submission at a time"
            )
    rulesets = sorted({run.ruleset for score in scores for run in score.runs if run.ruleset is not None})
    if len(rulesets) != 1:
        found = " and ".join(rulesets) or "v0.7, for which there are no rules"
        raise UserError(f"the logs are of {found}, but a submission has one round; choose it with --ruleset")
    subjects = [(score.system.folder_name, score.scaling) for score in scores]
    for name, scaling in subjects:
        if subjects.count((name, scaling)) > 1:
            raise UserError(
                f"submission_platform = {name}: its {scaling} runs differ in nodes, status or batch; "
                "give the folder of one kind of run at a time"
            )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        empty = is_empty(folder)
    if not empty:
        raise DataError(folder, "is not empty", "name a new folder for the submission")
    return rulesets[0]


def _made(folder: Path) -> Path:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_system(folder: Path, name: str, scores: Sequence[Score], ruleset: str) -> list[str]:
    """Write the description of system `name` as far as logged; return the fields that stay empty."""
    system = scores[0].system
    nodes = [
        score.system.nodes * (score.at_once if score.scaling == "weak" else 1)
        for score in scores
        if score.system.nodes is not None
    ]
    # All values are strings, because the checker joins them.
    description = {
        "submitter": system.org,
        "division": system.division,
        "status": system.status,
        "system_name": name,
        "number_of_nodes": str(max(nodes, default="")),
        "accelerators_per_node": str(system.accelerators_per_node),
    }
    path = _made(folder / "systems") / f"{name}.json"
    write_file(path, json.dumps(description).encode())
    missing = checkers.missing_fields(path, ruleset)
    write_file(path, json.dumps(description | dict.fromkeys(missing, ""), indent=4).encode() + b"\n")
    return missing


def _add_code(folder: Path, runs: Sequence[Run]) -> str:
    """Copy this project's code if it wrote the logs of `runs`; return a note on what is missing."""
    target = _made(folder / "benchmarks" / BENCHMARK / "implementations")
    sources = [run.source for run in runs if run.source]
    if not sources or any(os.path.isabs(each) or not (_ROOT / each).is_file() for each in sources):
        return f"{target.relative_to(folder)}: another program wrote these logs; add its code"
    target = _made(target / "cosmoflow-dali")
    for part in filter(is_present, (_ROOT / name for name in _CODE)):
        files, errors = find_files(part, ("",))
        for error in errors:
            raise error
        for file in files:
            if "__pycache__" not in file.parts:
                copy = _made((target / file.relative_to(_ROOT)).parent) / file.name
                write_file(copy, read_file(file))
                with contextlib.suppress(OSError):  # FAT and CIFS have no modes.
                    shutil.copymode(file, copy)
    return f"{target.relative_to(folder)}: add the configuration that was used"
