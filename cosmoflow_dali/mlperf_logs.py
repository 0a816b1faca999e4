"""MLPerf logs read back: what each run did, whether it counts, and the figures that a submission reports.

The lines are parsed, and each log is checked, by mlperf_logging itself (usage hpc, ruleset 3.0.0). The
figures follow the MLPerf HPC training rules,
https://github.com/mlcommons/training_policies/blob/master/hpc_training_rules.adoc, "HPC rules" below,
and where these point to them the MLPerf training rules, training_rules.adoc beside them.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.compliance_checker.mlp_parser import parse_file
from mlperf_logging.compliance_checker.mlp_parser.ruleset_300 import TOKEN
from mlperf_logging.mllog import constants

from cosmoflow_dali.log import MLPERF
from pipelines.errors import DataError

USAGE, RULESET, BENCHMARK = "hpc", "3.0.0", "cosmoflow"
TARGET_MAE = 0.124
"""What the HPC rules ask of CosmoFlow (section Benchmarks)."""

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
        then no part of the time; where it lies behind, it is.
    epochs: to the first evaluation that met the target, all before run_stop.
    rate: training samples a second on each accelerator; see `_rate`.
    complaints: of the compliance checker.
    faults: why this run does not count, the compliance checker's complaints aside.
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
    complaints: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    scaling: str | None = None
    content: tuple[str, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether it converged in a log that passes and that no other log repeats."""
        return not self.complaints and not self.faults

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
            runs[index] = replace(run, faults=(*run.faults, f"the same run as {original}"))
    return runs


@contextmanager
def heard() -> Iterator[list[logging.LogRecord]]:
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
    run = Run(path, str(name), scaling=named[-1] if named else None, complaints=_check(path))
    try:
        lines, _ = parse_file(str(path), ruleset=RULESET)
        events = _Events(lines)
    except OSError as error:
        return replace(run, faults=(f"cannot be read ({error.strerror})",))
    except (KeyError, OverflowError, TypeError) as error:
        # The parser is ready for broken JSON, but not for JSON that says something else.
        return replace(run, faults=(f"has a line that is no event ({error!r})",))
    if not lines:
        return replace(run, faults=("holds no whole line of MLPerf's",))
    benchmark, faults = events.value(constants.SUBMISSION_BENCHMARK), tuple(events.faults())
    if benchmark is None:
        return replace(run, faults=("does not say of which benchmark it is", *faults))
    if benchmark != BENCHMARK:
        return replace(run, faults=(f"is of {benchmark}, not of {BENCHMARK}",))
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
        rate=_rate(events, system),
        faults=faults,
        content=tuple(line.full_string for line in events.lines),
    )


def _check(path: Path) -> tuple[str, ...]:
    """What the compliance checker has against the log at `path`, a line each."""
    checker = mlp_compliance.make_checker(USAGE, RULESET, quiet=True, werror=False)
    # A queue that all checkers of a process share, and that one which broke off has not emptied.
    mlp_compliance.enqueued_configs.clear()
    with heard():
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


class _Events:
    """The lines of a log up to run_stop: what comes behind it, such as idle epochs, is no part of the run."""

    def __init__(self, lines: Sequence[Any]) -> None:
        # The parser takes "NaN" for a time.
        lines = [line for line in lines if math.isfinite(line.timestamp)]
        keys = [line.key for line in lines]
        self._times = Counter(keys)
        end = keys.index(constants.RUN_STOP) + 1 if constants.RUN_STOP in keys else len(keys)
        self.lines = lines[:end]
        self._first = {line.key: line for line in reversed(self.lines)}
        self.start, self.stop = (self.seconds(key) for key in (constants.RUN_START, constants.RUN_STOP))
        begun = self._first.get(constants.RUN_START)
        self.source = str(_metadata(begun).get("file", "")) if begun else ""

    def value(self, key: str, default: object = None) -> Any:
        """The value of the first event called `key`."""
        return self._first[key].value["value"] if key in self._first else default

    def count(self, key: str) -> int | None:
        """The value of `key` if it is a whole number."""
        value = self.value(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    def seconds(self, key: str) -> float | None:
        """When the first event called `key` was, in Unix time."""
        return self._first[key].timestamp / 1000 if key in self._first else None

    def errors(self) -> list[tuple[float, float]]:
        """The epochs of the evaluations and their mean absolute errors."""
        found = []
        for line in self.lines:
            error, epoch = line.value["value"], _metadata(line).get("epoch_num")
            if line.key == "eval_error" and isinstance(error, int | float) and isinstance(epoch, int | float):
                found.append((epoch, float(error)))
        return found

    def epochs_to_target(self) -> float | None:
        """The epoch of the first evaluation that met the target."""
        return next((epoch for epoch, error in self.errors() if 0 < error <= TARGET_MAE), None)

    def training_seconds(self) -> list[float]:
        """Of each epoch, from its start to its evaluation's, or to its own end where that is first."""
        ends = (constants.EVAL_START, constants.EPOCH_STOP)
        seconds, began = [], None
        for line in self.lines:
            if line.key == constants.EPOCH_START:
                began = line.timestamp
            elif line.key in ends and began is not None:
                seconds.append((line.timestamp - began) / 1000)
                began = None
        return seconds

    def faults(self) -> Iterator[str]:
        """Why this is not one run that converged."""
        started, stopped = (self._times[key] for key in (constants.RUN_START, constants.RUN_STOP))
        if started > 1 or stopped > 1:
            yield f"holds {max(started, stopped)} runs or ranks; a log is of one run, by one rank"
        elif self.start is None:
            yield "has no run_start"
        elif self.stop is None:
            yield "is cut off: has no run_stop"
        elif self.stop <= self.start:
            yield "its run_stop is not later than its run_start"
        if self.stop is None:
            return
        status = _metadata(self._first[constants.RUN_STOP]).get("status")
        if status != "success":
            yield f"the run ended with the status {status}"
        if self.epochs_to_target() is None:
            best = min((error for _, error in self.errors() if error > 0), default=math.nan)
            yield f"did not converge: its best error is {best:.4f}, the target {TARGET_MAE}"


def _metadata(line: Any) -> dict[str, Any]:
    metadata = line.value["metadata"]
    return metadata if isinstance(metadata, dict) else {}


def _rate(events: _Events, system: System) -> float | None:
    """Training samples a second on each accelerator: the median over the run's epochs.

    An epoch's samples are all of train_samples, and its time is that of training alone, without
    evaluation. It is the median as neither the slow first epoch nor one that stalled tells of a machine's
    speed, and it is taken from the times as not every log has a throughput of its own.
    """
    samples, seconds = events.count(constants.TRAIN_SAMPLES), events.training_seconds()
    if not samples or not system.accelerators or not seconds or min(seconds) <= 0:
        return None
    return samples / statistics.median(seconds) / system.accelerators
