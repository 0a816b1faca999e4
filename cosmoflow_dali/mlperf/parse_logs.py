"""The runs recorded in MLPerf logs: what each did, and whether it is valid.

mlperf_logging parses the logs, and checks them by the rules of their round. The figures follow the MLPerf HPC
training rules, https://github.com/mlcommons/training_policies/blob/master/hpc_training_rules.adoc ("HPC
rules" in this package), and, where these refer to them, the MLPerf training rules, training_rules.adoc in the
same folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from mlperf_logging.compliance_checker.mlp_parser import parse_file
from mlperf_logging.compliance_checker.mlp_parser.ruleset_300 import TOKEN
from mlperf_logging.mllog import constants

from cosmoflow_dali.mlperf.checkers import RULESETS, check_compliance, exception_text
from cosmoflow_dali.mlperf.read_events import RunEvents
from cosmoflow_dali.training.logs import MLPERF
from pipelines.errors import DataError
from pipelines.filesystem import find_files

BENCHMARK = "cosmoflow"

_PARSER_RULESET = "3.0.0"
"""The parser is the same for all rulesets."""

_FIRST_RUNS = {
    "1.0": datetime(2020, 11, 18, tzinfo=timezone.utc),
    "2.0": datetime(2021, 11, 17, tzinfo=timezone.utc),
    "3.0": datetime(2022, 11, 9, tzinfo=timezone.utc),
}
"""Dates on which the results of the round before were published (mlcommons.org), by round."""

_SUFFIXES = (".log", ".txt", ".out")
_SCALINGS = ("strong", "weak")


@dataclass(frozen=True, slots=True)
class System:
    """Submitter and system as logged; runs with equal ones belong together.

    Attributes:
        nodes, accelerators_per_node: None if the log has no such number.
        global_batch: Samples of a step.
    """

    org: str
    division: str
    status: str
    platform: str
    nodes: int | None
    accelerators_per_node: int | None
    global_batch: int | None

    @property
    def accelerators(self) -> int | None:
        """Accelerators of one run; the nodes of a machine whose logs give 0 per node."""
        if self.nodes is None or self.accelerators_per_node is None:
            return None
        return self.nodes * max(1, self.accelerators_per_node)

    @property
    def folder_name(self) -> str:
        """The platform as a name for folders and files."""
        return re.sub(r"[^\w.+-]+", "_", self.platform).strip("._") or "unknown"


@dataclass(frozen=True, slots=True)
class Run:
    """One run as its log records it; None for what the log lacks.

    Attributes:
        name: Path of the log, relative to the folder that was searched.
        system: None if the log is not one of CosmoFlow.
        seed: The first one logged.
        source: File of the program that logged run_start.
        start, stop: Unix time in seconds of run_start and run_stop, which bound the timed run.
        staging_start: Unix time in seconds.
        staging: Seconds from staging_start to staging_stop. Since HPC v3.0 it may come before run_start, and
            is then not part of the time; after run_start it is.
        epochs: Epochs to the first evaluation that met the target, before run_stop.
        rate: Training samples per second on each accelerator; see `RunEvents.rate`.
        ruleset: One of RULESETS, by which the log was checked; None if there is none for it.
        compliance_errors: Errors of the compliance checker.
        invalid_reasons: Other reasons for which the run is invalid.
        scaling: "strong" or "weak" if a folder in the log's path has that name, as in a submission.
        content: Lines that two logs of the same run share.
    """

    path: Path
    name: str
    system: System | None = None
    seed: int | None = None
    source: str = ""
    start: float | None = None
    stop: float | None = None
    staging_start: float | None = None
    staging: float | None = None
    epochs: float | None = None
    rate: float | None = None
    ruleset: str | None = RULESETS[-1]
    compliance_errors: tuple[str, ...] = ()
    invalid_reasons: tuple[str, ...] = ()
    scaling: str | None = None
    content: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        """True if the run converged, its log is compliant, and no other log repeats it."""
        return not self.compliance_errors and not self.invalid_reasons

    @property
    def minutes(self) -> float | None:
        """Time to train, from run_start to run_stop (training rules, section Run Results)."""
        return None if self.start is None or self.stop is None else (self.stop - self.start) / 60


def read_logs(folder: Path, ruleset: str | None = None) -> list[Run]:
    """Return the runs logged below `folder`, also behind symbolic links, sorted by name.

    Logs are mlperf.log, result_*.txt, and each other .log, .txt or .out file with MLPerf lines. They are
    checked by `ruleset`, by default that of the round that was open when they were written. What cannot be
    searched counts as an invalid run, because it may hold logs.

    Raises:
        DataError: There is no such log.
    """
    if not os.path.isdir(folder):
        raise DataError(folder, "is not a folder", "give the folder that holds the logs")
    paths, errors = find_files(folder, _SUFFIXES)
    runs = [_read(path, folder, ruleset) for path in sorted(paths, key=_natural) if _is_log(path)]
    runs += [
        _invalid(Run(Path(error.path), os.path.relpath(error.path, folder)), error.fault) for error in errors
    ]
    if not runs:
        reason = f"contains no MLPerf log such as {MLPERF} or result_0.txt"
        raise DataError(folder, reason, "give the folder of a run")
    first: dict[tuple[str, ...], str] = {}
    for index, run in enumerate(runs):
        original = first.setdefault(run.content, run.name) if run.content else run.name
        if original != run.name:
            runs[index] = _invalid(run, *run.invalid_reasons, f"the same run as {original}")
    return runs


def _natural(path: Path) -> tuple[str, int, str]:
    """Return a sort key that puts result_9 before result_10."""
    digits = path.stem[len(path.stem.rstrip("0123456789")) :]
    return str(path.parent / path.stem.removesuffix(digits)), int(digits or -1), path.name


def _is_log(path: Path) -> bool:
    if path.name == MLPERF or path.match("result_*.txt"):
        return True
    try:
        with open(path, encoding="latin-1") as file:
            return any(TOKEN in line for line in file)
    except OSError:
        return True


def _invalid(run: Run, *reasons: str) -> Run:
    return replace(run, invalid_reasons=reasons)


def _ruleset(events: RunEvents) -> str | None:
    """Return the ruleset of the round that was open when the run began, the newest if it is not known."""
    if events.start is None:
        return RULESETS[-1]
    rounds = [round_ for round_, first in _FIRST_RUNS.items() if first.timestamp() <= events.start]
    return rounds[-1] if rounds else None


def _read(path: Path, folder: Path, ruleset: str | None) -> Run:
    name = path.relative_to(folder)
    scalings = [part for part in (folder.resolve().name, *name.parts[:-1]) if part in _SCALINGS]
    run = Run(path, str(name), scaling=scalings[-1] if scalings else None, ruleset=ruleset or RULESETS[-1])
    lines, fault = [], "contains no complete MLPerf line"
    try:
        lines, _ = parse_file(str(path), ruleset=_PARSER_RULESET)
        events = RunEvents(lines)
        run = replace(run, ruleset=ruleset or _ruleset(events))
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    except (KeyError, OverflowError, TypeError) as error:
        # The parser handles broken JSON, but not valid JSON that is not an event.
        lines, fault = [], f"contains a line that is not an event ({exception_text(error)})"
    if run.ruleset is not None:
        run = replace(run, compliance_errors=check_compliance(path, run.ruleset))
    if not lines:
        return _invalid(run, fault)
    benchmark, reasons = events.value(constants.SUBMISSION_BENCHMARK), tuple(events.invalid_reasons())
    if run.ruleset is None:
        reasons = ("is of HPC v0.7, for which there are no rules; --ruleset applies others", *reasons)
    if benchmark is None:
        return _invalid(run, "does not name its benchmark", *reasons)
    if benchmark != BENCHMARK:
        return _invalid(run, f"benchmark is {benchmark}, not {BENCHMARK}")
    org, division, status, platform = (
        str(events.value(f"submission_{field}", "")) for field in ("org", "division", "status", "platform")
    )
    nodes, per_node, batch = (
        events.count(key) for key in ("number_of_nodes", "accelerators_per_node", constants.GLOBAL_BATCH_SIZE)
    )
    system = System(org, division, status, platform, nodes, per_node, batch)
    staging_start, staging_stop = events.seconds("staging_start"), events.seconds("staging_stop")
    return replace(
        run,
        system=system,
        seed=events.count(constants.SEED),
        source=events.source,
        start=events.start,
        stop=events.stop,
        staging_start=staging_start,
        staging=None if staging_start is None or staging_stop is None else staging_stop - staging_start,
        epochs=events.epochs_to_target(),
        rate=events.rate(system.accelerators),
        invalid_reasons=reasons,
        content=tuple(line.full_string for line in events.lines),
    )
