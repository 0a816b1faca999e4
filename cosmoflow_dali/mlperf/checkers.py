"""The official checkers of mlperf_logging (usage hpc, ruleset 3.0.0), and what they say, in short."""

from __future__ import annotations

import glob
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.package_checker.seed_checker import SeedChecker
from mlperf_logging.rcp_checker import rcp_checker
from mlperf_logging.system_desc_checker import system_desc_checker

USAGE, RULESET = "hpc", "3.0.0"

_SUCCESS = "PACKAGE CHECKER FOUND NO ERRORS"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one checker says.

    of: the folder below the submission's that it looked at.
    messages: its reasons, a line each.
    """

    checker: str
    of: str
    passed: bool
    messages: tuple[str, ...]


def check_compliance(path: Path) -> tuple[str, ...]:
    """What the compliance checker has against the log at `path`, a line each."""
    checker = mlp_compliance.make_checker(USAGE, RULESET, quiet=True, werror=False)
    # A queue that all checkers of a process share, and that one which broke off has not emptied.
    mlp_compliance.enqueued_configs.clear()
    with capture_logs():
        try:
            mlp_compliance.main(str(path), f"{USAGE}_{RULESET}/common.yaml", checker)
        except Exception as error:
            # It computes with what a log says, of whatever type that is.
            return (f"the checker breaks off: {error!r}",)
    return tuple(map(_brief, (*checker.overwritable.values(), *checker.not_overwritable)))


def _brief(complaint: str) -> str:
    """The checker's `complaint` without the context that it prints over many lines."""
    first, *rest = complaint.splitlines()
    return " ".join([first, *(line for line in rest if line.startswith("failed test"))])


def missing_fields(description: Path) -> list[str]:
    """What the JSON file `description` of a system lacks; the names stand in the checker alone."""
    with capture_logs() as records:
        system_desc_checker.check_system_desc(str(description), USAGE, RULESET)
    return [
        field for record in records for field in re.findall(r"Missing field ([\w-]+)", record.getMessage())
    ]


def check_package(folder: Path) -> Verdict:
    """Of a whole submission in `folder`."""
    # As a program of its own and inside the folder, whose name might read as a pattern. It exits with 0
    # whatever it finds, so that its words are all there is to go by.
    line = [sys.executable, "-m", "mlperf_logging.package_checker", ".", USAGE, RULESET]
    done = subprocess.run(
        [*line, "--log_output", os.devnull], cwd=folder, capture_output=True, text=True, check=False
    )
    *_, last = done.stderr.splitlines() or [""]
    if done.returncode:
        return Verdict("package checker", ".", False, (f"it breaks off: {last}",))
    errors = re.findall(r"^ERROR - *(.*)", done.stderr, re.MULTILINE)
    return Verdict("package checker", ".", _SUCCESS in done.stderr, tuple(errors))


def check_seeds(folder: Path, place: Path) -> Verdict:
    """Of the logs in `place`, a folder below the submission's `folder`."""
    logs = sorted(map(str, (folder / place).iterdir()))
    with capture_logs() as records, warnings.catch_warnings():
        # It warns of a log with more than one seed, which the rules allow.
        warnings.simplefilter("ignore")
        passed = SeedChecker(RULESET).check_seeds(logs)
    errors = (record.getMessage().strip() for record in records if record.levelname == "ERROR")
    return Verdict("seed checker", str(place), passed, tuple(errors))


def check_convergence(folder: Path, place: Path) -> Verdict:
    """Of the epochs that the runs in `place` took, beside the reference's, as the package checker does it."""
    checker = "reference-convergence checker"
    with capture_logs() as records, warnings.catch_warnings():
        # Of fewer than three runs it takes a mean of none.
        warnings.simplefilter("ignore")
        try:
            passed, message, factor = rcp_checker.check_directory(
                glob.escape(str(folder / place)), USAGE, RULESET, False, False, rcp_pass="pruned_rcps"
            )
        except Exception as error:
            # It takes it for granted that a log has what the compliance checker asks for.
            return Verdict(checker, str(place), False, (f"it breaks off: {error!r}",))
    messages = [message]
    for record in records:
        args: Any = record.args
        if record.msg.startswith(" RCP Record"):
            mean, least = args["RCP Mean"], args["Min Epochs"]
            messages.append(
                f"the reference took {mean:.4f} epochs on average, the least allowed is {least:.4f}"
            )
        elif record.msg.startswith(" Submission mean epochs: "):
            messages.append(f"these runs took {args[0]:.4f}")
    if passed and factor > 1:
        messages.append(f"as they took fewer than the reference, their time is multiplied by {factor:.4f}")
    return Verdict(checker, str(place), bool(passed), tuple(messages))


@contextmanager
def capture_logs() -> Iterator[list[logging.LogRecord]]:
    """What mlperf_logging's checkers say in the body, to the root logger, instead of having it printed."""
    listener, root = _Listener(), logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = [listener]
    root.setLevel(logging.INFO)
    try:
        yield listener.records
    finally:
        root.handlers = handlers
        root.setLevel(level)


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
