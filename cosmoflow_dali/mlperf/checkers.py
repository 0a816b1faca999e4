"""The official checkers of mlperf_logging (usage hpc), with their messages shortened.

A ruleset is named by its round, such as "3.0".
"""

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

USAGE = "hpc"
RULESETS = ("1.0", "2.0", "3.0")
"""Rounds of MLPerf HPC with rules; there are none for the first, 0.7."""

_SUCCESS = "PACKAGE CHECKER FOUND NO ERRORS"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of one checker.

    Attributes:
        checker: Name of the checker.
        subject: Checked folder, relative to the submission's folder.
        passed: True if the checker found no error.
        messages: Reasons, one line each.
    """

    checker: str
    subject: str
    passed: bool
    messages: tuple[str, ...]


def check_compliance(path: Path, ruleset: str) -> tuple[str, ...]:
    """Return the errors of the compliance checker for the log at `path`, one line each."""
    checker = mlp_compliance.make_checker(USAGE, f"{ruleset}.0", quiet=True, werror=False)
    # All checkers of a process share this queue, and one that raised has not emptied it.
    mlp_compliance.enqueued_configs.clear()
    with capture_logs():
        try:
            mlp_compliance.main(str(path), f"{USAGE}_{ruleset}.0/common.yaml", checker)
        except Exception as error:
            # The checker computes with logged values of any type.
            return (f"the checker failed: {exception_text(error)}",)
    return tuple(map(_brief, (*checker.overwritable.values(), *checker.not_overwritable)))


def exception_text(error: Exception) -> str:
    """Return type and arguments of `error`, one that a library did not mean for users, in one line."""
    return " ".join(f"{type(error).__name__}: {', '.join(map(str, error.args))}".split())


def _brief(message: str) -> str:
    """Return the checker's `message` without the context that it prints over many lines."""
    first, *rest = message.splitlines()
    return " ".join([first, *(line for line in rest if line.startswith("failed test"))])


def missing_fields(description: Path, ruleset: str) -> list[str]:
    """Return the fields that the JSON file `description` of a system lacks; only the checker lists them."""
    with capture_logs() as records:
        system_desc_checker.check_system_desc(str(description), USAGE, f"{ruleset}.0")
    return [
        field for record in records for field in re.findall(r"Missing field ([\w-]+)", record.getMessage())
    ]


def check_package(folder: Path, ruleset: str) -> Verdict:
    """Run the package checker on the whole submission in `folder`."""
    # It runs inside the folder, because it would read special characters in the path as a pattern. It always
    # exits with 0, so the verdict is taken from its output.
    line = [sys.executable, "-m", "mlperf_logging.package_checker", ".", USAGE, f"{ruleset}.0"]
    line += ["--log_output", os.devnull]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    *_, last = done.stderr.splitlines() or [""]
    if done.returncode:
        return Verdict("package checker", ".", False, (f"the checker failed: {last}",))
    errors = re.findall(r"^ERROR - *(.*)", done.stderr, re.MULTILINE)
    return Verdict("package checker", ".", _SUCCESS in done.stderr, tuple(errors))


def check_seeds(folder: Path, subject: Path, ruleset: str) -> Verdict:
    """Run the seed checker on the logs in `subject`, relative to the submission's `folder`."""
    with capture_logs() as records:
        passed = SeedChecker(f"{ruleset}.0").check_seeds(sorted(map(str, (folder / subject).iterdir())))
    errors = (record.getMessage().strip() for record in records if record.levelname == "ERROR")
    return Verdict("seed checker", str(subject), passed, tuple(errors))


def check_convergence(folder: Path, subject: Path, ruleset: str) -> Verdict:
    """Compare the epochs of the runs in `subject` with the reference's, as the package checker does."""
    checker = "reference-convergence checker"
    with capture_logs() as records:
        try:
            passed, message, factor = rcp_checker.check_directory(
                glob.escape(str(folder / subject)),
                USAGE,
                f"{ruleset}.0",
                False,
                False,
                rcp_pass="pruned_rcps",
            )
        except Exception as error:
            # The checker relies on values that only compliant logs have.
            return Verdict(checker, str(subject), False, (f"the checker failed: {exception_text(error)}",))
    messages = [message]
    for record in records:
        args: Any = record.args
        if record.msg.startswith(" RCP Record"):
            mean, least = args["RCP Mean"], args["Min Epochs"]
            messages.append(f"the reference took {mean:.4f} epochs on average; the minimum is {least:.4f}")
        elif record.msg.startswith(" Submission mean epochs: "):
            messages.append(f"these runs took {args[0]:.4f}")
    if passed and factor > 1:
        messages.append(f"fewer epochs than the reference: times are multiplied by {factor:.4f}")
    return Verdict(checker, str(subject), bool(passed), tuple(messages))


@contextmanager
def capture_logs() -> Iterator[list[logging.LogRecord]]:
    """Yield the list of records that the body logs to the root logger; print neither them nor warnings.

    The checkers report through logging. They also warn about logs with several seeds, which the rules allow,
    and of the mean of no values where there are fewer than three runs.
    """
    records: list[logging.LogRecord] = []
    handler, root = logging.Handler(), logging.getLogger()
    handler.emit = records.append  # type: ignore[assignment]
    handlers, level = root.handlers, root.level
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield records
    finally:
        root.handlers = handlers
        root.setLevel(level)
