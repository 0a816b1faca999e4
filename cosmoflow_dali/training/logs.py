"""What a run writes down as it goes: metrics.jsonl, the MLPerf log, and lines on the console.

Only rank 0 writes. Both files are append-only, and a checkpoint remembers how long they were, so
that a resumed run cuts off what came after it and the logs read as one run's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mlperf_logging.mllog.mllog import MLLogger
from tqdm import tqdm

from pipelines.distributed.world import World
from pipelines.errors import AccessError

METRICS = "metrics.jsonl"
MLPERF = "mlperf.log"
_ROOT = str(Path(__file__).resolve().parents[2])


class RunLogs:
    """The log files of one run folder, or, on a rank that writes none, nothing at all.

    mlperf: the MLPerf logger (`event`, `start`, `end`); see mlperf_logging.
    """

    def __init__(self, folder: Path | None, lengths: dict[str, int] | None = None) -> None:
        """Open the logs in `folder`, cut to `lengths` bytes; without a `folder`, write nowhere."""
        self._paths = {name: folder / name for name in (METRICS, MLPERF)} if folder else {}
        for name, path in self._paths.items():
            with open(path, "ab") as file:
                file.truncate((lengths or {}).get(name, 0))
        self._metrics = self._paths[METRICS].open("a", encoding="utf-8") if folder else None
        self._handler: logging.Handler = (
            _RaisingHandler(self._paths[MLPERF], encoding="utf-8") if folder else logging.NullHandler()
        )
        logger = logging.Logger("cosmoflow_dali.mlperf.log_events", logging.INFO)
        logger.addHandler(self._handler)
        self.mlperf = MLLogger(logger, default_namespace="", root_dir=_ROOT)

    def metric(self, record: dict[str, Any]) -> None:
        """Append `record` to metrics.jsonl as one line; AccessError where that fails."""
        if self._metrics is not None:
            try:
                # A reader that follows the file should see whole lines at once.
                self._metrics.write(json.dumps(record) + "\n")
                self._metrics.flush()
            except OSError as error:
                raise AccessError.writing(self._paths[METRICS], error) from error

    def lengths(self) -> dict[str, int]:
        """Bytes in each file so far, by name."""
        self._handler.flush()
        return {name: os.stat(path).st_size for name, path in self._paths.items()}

    def __enter__(self) -> RunLogs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Closing a file tries once more to write what a full disk has just refused.
        with suppress(OSError) if error is not None else nullcontext():
            self._handler.close()
            if self._metrics is not None:
                self._metrics.close()


class _RaisingHandler(logging.FileHandler):
    """A log that a full disk cuts off ends the run, rather than going on with a hole in it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise AccessError.writing(Path(self.baseFilename), error) from error
        super().handleError(record)


def configure_logging(world: World) -> None:
    """Log to standard error: all messages on rank 0, and on others warnings with the rank as prefix."""
    handler = _ConsoleHandler()
    handler.setFormatter(
        logging.Formatter(f"rank {world.rank}: %(message)s" if world.rank else "%(message)s")
    )
    logger = logging.getLogger("cosmoflow_dali")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if world.is_root else logging.WARNING)


class _ConsoleHandler(logging.Handler):
    """Write records to standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class Console:
    """Lines and a progress bar for a person, on rank 0; silence on the others.

    Where standard error is no terminal the bar is a plain line now and then.
    """

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._terminal = speaks and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._next_line = 0.0

    def say(self, line: str) -> None:
        """Print `line` above the bar."""
        if self._speaks:
            tqdm.write(line, file=sys.stderr)

    def start_epoch(self, epoch: int, epochs: int, done: int, steps: int) -> None:
        """Begin the bar of `epoch` at `done` of `steps` steps."""
        if self._terminal:
            self._bar = tqdm(total=steps, initial=done, desc=f"epoch {epoch + 1}/{epochs}", leave=False)

    def advance(self, steps: int, now: float, line: Callable[[], str]) -> None:
        """Move the bar on by `steps`, or print `line()` if the last one is a while ago at `now` seconds."""
        if self._bar is not None:
            self._bar.set_postfix_str(line(), refresh=False)
            self._bar.update(steps)
        elif self._speaks and now >= self._next_line:
            self.say(line())
            self._next_line = now + 15.0

    def end_epoch(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
