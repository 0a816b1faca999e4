"""Output of a running training: metrics.jsonl, the MLPerf log, and messages on the console.

Only rank 0 writes the files. Both are append-only, and a checkpoint records their lengths, so that a
resumed run truncates what was written after it and the logs read as those of one run.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from mlperf_logging.mllog.mllog import MLLogger
from tqdm import tqdm

from pipelines.distributed.world import World
from pipelines.errors import printable, writing

METRICS = "metrics.jsonl"
MLPERF = "mlperf.log"
_ROOT = str(Path(__file__).resolve().parents[2])
_LINE_INTERVAL = 15.0
"""Seconds between messages about progress if standard error is not a terminal."""

logger = logging.getLogger(__name__)


class RunLogs:
    """Log files of a run folder; writes nothing on a rank without a folder.

    Attributes:
        mlperf: The MLPerf logger (`event`, `start`, `end`); see mlperf_logging.
    """

    def __init__(self, folder: Path | None, lengths: dict[str, int] | None = None) -> None:
        """Open the logs in `folder`, truncated to `lengths` bytes; without a `folder`, write nothing."""
        metrics, mlperf = (logging.Logger(name, logging.INFO) for name in (METRICS, MLPERF))
        self._files: list[_RaisingHandler] = []
        if folder:
            for log in (metrics, mlperf):
                path = folder / log.name
                with open(path, "ab") as file:
                    file.truncate((lengths or {}).get(log.name, 0))
                log.addHandler(handler := _RaisingHandler(path, encoding="utf-8"))
                self._files.append(handler)
        self._metrics = metrics
        self.mlperf = MLLogger(mlperf, default_namespace="", root_dir=_ROOT)

    def metric(self, record: dict[str, Any]) -> None:
        """Append `record` to metrics.jsonl as one line; raise AccessError if that fails."""
        self._metrics.info(json.dumps(record))

    def lengths(self) -> dict[str, int]:
        """Return the bytes in each file so far, by name."""
        return {path.name: path.stat().st_size for path in (Path(file.baseFilename) for file in self._files)}

    def __enter__(self) -> RunLogs:
        return self

    def __exit__(self, *error: object) -> None:
        # After an error, closing may fail again to write what a full disk has refused.
        with suppress(OSError) if any(error) else nullcontext():
            for file in self._files:
                file.close()


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
