"""MLPerf logs read back: what each run did, whether it counts, and the figures that a submission reports.

The lines are parsed, and each log is checked, by mlperf_logging itself (usage hpc, ruleset 3.0.0). The
figures follow the MLPerf HPC training rules,
https://github.com/mlcommons/training_policies/blob/master/hpc_training_rules.adoc, "HPC rules" below,
and where these point to them the MLPerf training rules, training_rules.adoc beside them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from mlperf_logging.compliance_checker.mlp_parser import parse_file
from mlperf_logging.compliance_checker.mlp_parser.ruleset_300 import TOKEN
from mlperf_logging.mllog import constants

from cosmoflow_dali.mlperf.checkers import RULESET, check_compliance
from cosmoflow_dali.mlperf.events import Events, rate
from cosmoflow_dali.training.logs import MLPERF
from pipelines.errors import DataError

BENCHMARK = "cosmoflow"

_SUFFIXES = (".log", ".txt", ".out")
_SCALINGS = ("strong", "weak")


@dataclass(frozen=True, slots=True)
class System:
    """Who ran on what, as the log says; runs that share it belong together.

    nodes, accelerators_per_node: None where the log has no such number.
    global_batch: samples a step.
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
        """Of one run; a machine without any, whose logs give 0 a node, counts its nodes."""
        if self.nodes is None or self.accelerators_per_node is None:
            return None
        return self.nodes * max(1, self.accelerators_per_node)


@dataclass(frozen=True, slots=True)
class Run:
    """What one log tells of one run; None where it does not tell.

    name: the log's path below the folder that was asked for.
    system: None for what is no log of CosmoFlow.
    seed: the first one logged.
    source: the program's file that logged run_start.
    start, stop: of the timed run (run_start, run_stop), seconds of Unix time.
    staging_start: seconds of Unix time.
    staging: seconds from staging_start to staging_stop. Since HPC v3.0 it may lie before run_start and is
        then no part of the time; where it lies after it, it is.
    epochs: to the first evaluation that met the target, all before run_stop.
    rate: training samples a second on each accelerator; see `mlperf_events.rate`.
    compliance_errors: of the compliance checker.
    invalid_reasons: why this run does not count, the compliance errors aside.
    scaling: "strong" or "weak" where a folder of the log's path is named so, as in a submission.
    content: what two logs of the same run share.
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
    compliance_errors: tuple[str, ...] = ()
    invalid_reasons: tuple[str, ...] = ()
    scaling: str | None = None
    content: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        """True if the run converged, its log passes compliance and no other log repeats it."""
        return not self.compliance_errors and not self.invalid_reasons

    @property
    def minutes(self) -> float | None:
        """Time to train: from run_start to run_stop (training rules, section Run Results)."""
        return None if self.start is None or self.stop is None else (self.stop - self.start) / 60


def read_logs(folder: Path) -> list[Run]:
    """The runs logged below `folder`, by name; DataError where there are none.

    Logs are mlperf.log, result_*.txt, and whatever other .log, .txt or .out holds lines of MLPerf's.
    """
    if not folder.is_dir():
        raise DataError(folder, "is no folder", "give the one that holds the logs")
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    runs = [_read(path, folder) for path in sorted(paths, key=_natural) if _is_log(path)]
    if not runs:
        raise DataError(
            folder, f"holds no MLPerf log, such as {MLPERF} or result_0.txt", "give the folder of a run"
        )
    first: dict[tuple[str, ...], str] = {}
    for index, run in enumerate(runs):
        original = first.setdefault(run.content, run.name) if run.content else run.name
        if original != run.name:
            runs[index] = replace(run, invalid_reasons=(*run.invalid_reasons, f"the same run as {original}"))
    return runs


def _natural(path: Path) -> tuple[str, int, str]:
    """A key that puts result_9 before result_10."""
    digits = path.stem[len(path.stem.rstrip("0123456789")) :]
    return str(path.parent / path.stem.removesuffix(digits)), int(digits or -1), path.name


def _is_log(path: Path) -> bool:
    if path.name == MLPERF or path.match("result_*.txt"):
        return True
    try:
        with open(path, encoding="latin-1") as file:
            return path.suffix in _SUFFIXES and any(TOKEN in line for line in file)
    except OSError:
        return path.suffix in _SUFFIXES


def _read(path: Path, folder: Path) -> Run:
    name = path.relative_to(folder)
    named = [part for part in (folder.resolve().name, *name.parts[:-1]) if part in _SCALINGS]
    run = Run(path, str(name), scaling=named[-1] if named else None, compliance_errors=check_compliance(path))
    try:
        lines, _ = parse_file(str(path), ruleset=RULESET)
        events = Events(lines)
    except OSError as error:
        return replace(run, invalid_reasons=(f"cannot be read ({error.strerror})",))
    except (KeyError, OverflowError, TypeError) as error:
        # The parser is ready for broken JSON, but not for JSON that says something else.
        return replace(run, invalid_reasons=(f"has a line that is no event ({error!r})",))
    if not lines:
        return replace(run, invalid_reasons=("holds no whole line of MLPerf's",))
    benchmark, invalid_reasons = events.value(constants.SUBMISSION_BENCHMARK), tuple(events.invalid_reasons())
    if benchmark is None:
        return replace(run, invalid_reasons=("does not say of which benchmark it is", *invalid_reasons))
    if benchmark != BENCHMARK:
        return replace(run, invalid_reasons=(f"is of {benchmark}, not of {BENCHMARK}",))
    org, division, status, platform = (
        str(events.value(f"submission_{what}", "")) for what in ("org", "division", "status", "platform")
    )
    system = System(
        org,
        division,
        status,
        platform,
        events.count("number_of_nodes"),
        events.count("accelerators_per_node"),
        events.count(constants.GLOBAL_BATCH_SIZE),
    )
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
        rate=rate(events, system.accelerators),
        invalid_reasons=invalid_reasons,
        content=tuple(line.full_string for line in events.lines),
    )
