"""Output of a running training: metrics.jsonl, the MLPerf log, and messages on the console.

Only rank 0 writes the files. Both are append-only, and on the disk before a checkpoint that records their
lengths, so that a resumed run truncates what was written after it and the logs read as those of one run.
A disk may still lose lines. Of the MLPerf log, whose lines are few and whose times count, the checkpoint
has a copy; metrics.jsonl then has a gap.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlperf_logging.mllog.mllog import MLLogger
from tqdm import tqdm

from cosmoflow_dali.training.trackers import TrackerThread
from pipelines.distributed.world import World
from pipelines.errors import AccessError, printable, writing
from pipelines.filesystem import sync_file
from pipelines.io import read_file, write_file

METRICS = "metrics.jsonl"
MLPERF = "mlperf.log"
_RUN_STOP = b'"key": "run_stop"'
_ROOT = str(Path(__file__).resolve().parents[2])
_LINE_INTERVAL = 15.0
"""Seconds between messages about progress if standard error is not a terminal."""

logger = logging.getLogger(__name__)


class RunLogs:
    """Log files of a run folder; writes nothing on a rank without a folder.

    Attributes:
        mlperf: The MLPerf logger (`event`, `start`, `end`); see mlperf_logging.
        run_stop_ms: Time of the run_stop of the run that is resumed, in Unix ms; None if it has none.
    """

    def __init__(
        self,
        folder: Path | None,
        lengths: Mapping[str, int] = MappingProxyType({}),
        mlperf_log: str = "",
        trackers: Sequence[str] = (),
    ) -> None:
        """Open the logs in `folder`; without a `folder`, write nothing.

        Args:
            folder: Folder of the run.
            lengths: Bytes of each log to keep, by name.
            mlperf_log: The bytes to keep of the MLPerf log, if they are known.
            trackers: Names of programs that also get the records of metrics.jsonl.
        """
        self.run_stop_ms: int | None = None
        self._trackers: list[TrackerThread] = []
        metrics, mlperf = (logging.Logger(name, logging.INFO) for name in (METRICS, MLPERF))
        self._files: list[_RaisingHandler] = []
        if folder:
            for log in (metrics, mlperf):
                path = folder / log.name
                present = read_file(path) if path.exists() else b""
                copy = mlperf_log.encode() if log is mlperf else b""
                kept = _recover(path, present, lengths.get(log.name, 0), copy)
                if log is mlperf and lengths:
                    self.run_stop_ms = _time_of_run_stop(copy or _intact_lines(present))
                    # A resumed run logs its end itself.
                    kept = b"".join(line for line in kept.splitlines(True) if _RUN_STOP not in line)
                write_file(path, kept)
                with writing(path):
                    log.addHandler(handler := _RaisingHandler(path, encoding="utf-8"))
                self._files.append(handler)
            self._trackers = [TrackerThread(name, folder) for name in trackers]
            for line in read_file(folder / METRICS).splitlines() if trackers else ():
                self._track(json.loads(line))
        self._metrics = metrics
        self.mlperf = MLLogger(mlperf, default_namespace="", root_dir=_ROOT)

    def metric(self, record: dict[str, Any]) -> None:
        """Append `record`, with the time, to metrics.jsonl as one line; raise AccessError if that fails."""
        record = {**record, "time_ms": round(1e3 * time.time())}
        self._metrics.info(json.dumps(record))
        self._track(record)

    def summarize(self, summary: dict[str, Any]) -> None:
        """Hand the numbers of summary.json to the trackers."""
        self._track({**summary, "kind": "summary", "step": summary["steps"]})

    def _track(self, record: dict[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(record)

    def sync(self) -> tuple[dict[str, int], str]:
        """Wait until all lines are on the disk; return the bytes in each file by name, and the MLPerf log."""
        lengths, mlperf_log = {}, ""
        for path, file in ((Path(file.baseFilename), file) for file in self._files):
            assert file.stream is not None, "the file is open until the logs are closed"
            with writing(path):
                sync_file(file.stream.fileno(), path)
                lengths[path.name] = os.fstat(file.stream.fileno()).st_size
            if path.name == MLPERF:
                mlperf_log = read_file(path).decode()
        return lengths, mlperf_log

    def __enter__(self) -> RunLogs:
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self._trackers:
            tracker.close(failed=any(error))
        # After an error, closing may fail again to write what a full disk has refused.
        with suppress(AccessError) if any(error) else nullcontext():
            for file in self._files:
                with writing(file.baseFilename):
                    file.close()


def _recover(path: Path, present: bytes, length: int, copy: bytes) -> bytes:
    """Return the first `length` bytes of the log at `path`: its `copy`, or else those that are `present`."""
    kept = _intact_lines(present[:length])
    if kept != (copy or kept) or len(kept) < length:
        remedy = "they are restored from the checkpoint" if copy else "their lines are missing"
        logger.warning("%s: lost %d of %d bytes; %s", path, length - len(kept), length, remedy)
    return copy or kept


def _intact_lines(content: bytes) -> bytes:
    """Return `content` without lines that a crash cut off, or in which it left other bytes."""
    return b"".join(line for line in io.BytesIO(content) if line.endswith(b"\n") and _is_record(line))


def _is_record(line: bytes) -> bool:
    """Return True if `line` is a JSON object, as in metrics.jsonl, or one behind the prefix of MLPerf."""
    try:
        return isinstance(json.loads(line.decode().removeprefix(":::MLLOG ")), dict)
    except ValueError:
        return False


def _time_of_run_stop(mlperf_log: bytes) -> int | None:
    """Return the time of the last run_stop in `mlperf_log`, in Unix ms."""
    events = [line for line in mlperf_log.splitlines() if _RUN_STOP in line]
    return int(json.loads(events[-1].partition(b" ")[2])["time_ms"]) if events else None


class _RaisingHandler(logging.FileHandler):
    """Raise an error if a record cannot be written; logging would print it and continue."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        with writing(self.baseFilename):
            raise  # The error that is being handled.


def configure_logging(world: World) -> None:
    """Log to standard error: all messages on rank 0, and on others warnings with the rank as prefix."""
    handler = _ConsoleHandler()
    handler.setFormatter(
        logging.Formatter(f"rank {world.rank}: %(message)s" if world.rank else "%(message)s")
    )
    logging.getLogger("pipelines").handlers = [handler]
    package = logging.getLogger("cosmoflow_dali")
    package.handlers = [handler]
    package.setLevel(logging.INFO if world.is_root else logging.WARNING)


class _ConsoleHandler(logging.Handler):
    """Write records to standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(printable(self.format(record)), file=sys.stderr)


class Progress:
    """Progress of training: a bar on a terminal, otherwise a message from time to time."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._next_line = 0.0

    @contextmanager
    def epoch(self, title: str, first: int, steps: int) -> Iterator[None]:
        """Show an epoch of `steps` steps, from step `first` on."""
        # disable=None: on a terminal only.
        shown = logger.isEnabledFor(logging.INFO)
        with tqdm(
            total=steps, initial=first, desc=title, leave=False, disable=None if shown else True
        ) as self._bar:
            yield

    def advance(self, steps: int, line: str) -> None:
        """Advance by `steps` steps and show `line`."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update(steps)
        elif (now := time.monotonic()) >= self._next_line:
            logger.info(line)
            self._next_line = now + _LINE_INTERVAL
