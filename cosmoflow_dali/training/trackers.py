"""Copies of a run's records in programs that plot curves: TensorBoard and Weights & Biases.

metrics.jsonl is the source. When a run is resumed, every tracker gets the records that the run keeps, and the
new ones. TensorBoard's files are written anew, and W&B leaves out what it has: curves have neither gaps nor
points twice, also where a tracker is added late or has failed before.
"""

from __future__ import annotations

import importlib.metadata
import logging
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import yaml

from pipelines.errors import ConfigError, UserError
from pipelines.io import read_file, write_file
from pipelines.settings import flatten_tree

_CLOSE_SECONDS = 20
"""Seconds for a tracker to end: a scheduler that has sent SIGTERM kills after 30 s."""

_KEYS = ("kind", "step", "time_ms")
"""Keys of a record that say what its numbers are."""

logger = logging.getLogger(__name__)


def check_installed(trackers: Iterable[str]) -> None:
    """Raise ConfigError if the package of one of `trackers` is missing."""
    for name in trackers:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            advice = f"{name} is not installed; `pip install {name}`, or leave it out"
            raise ConfigError("log.trackers", name, advice) from None


class Tracker(Protocol):
    """A program's view of one run."""

    def __init__(self, folder: Path) -> None:
        """Open the view of the run in `folder`."""

    def log(self, kind: str, step: int, seconds: float | None, values: dict[str, float]) -> None:
        """Add the numbers of a record of `kind` at `step`, by name; `seconds` is its Unix time, if known."""

    def close(self, *, failed: bool) -> None:
        """Deliver everything, and end."""


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        for old in path.glob("events.out.tfevents.*"):
            old.unlink()
        # A TensorBoard that shows the old files drops what it has read.
        self._writer = SummaryWriter(str(path), purge_step=0)

    def log(self, kind: str, step: int, seconds: float | None, values: dict[str, float]) -> None:
        """Write the numbers as scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, whose id is kept in `wandb/` of the run's folder.

    W&B numbers the rows of a run in ascending order and knows the last one. A row's number is twice its step,
    and one more for an evaluation.
    """

    def __init__(self, folder: Path) -> None:
        import wandb

        settings = wandb.setup().settings
        if settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("not logged in; `wandb login`, or set WANDB_MODE=offline")
        kept = folder / "wandb" / "run_id"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            write_file(kept, secrets.token_hex(4).encode())
        self._wandb = wandb
        self._run = wandb.init(
            id=read_file(kept).decode(),
            resume="allow",
            dir=folder,
            project=settings.project or "cosmoflow-dali",
            name=settings.run_name or "/".join(folder.resolve().parts[-2:]),
            config=yaml.safe_load(read_file(folder / "config.yaml")),
            settings=wandb.Settings(
                console="off",
                silent=True,
                # W&B holds the exit of the process for so long where its server does not answer.
                init_timeout=_CLOSE_SECONDS,
                # What is not uploaded by then stays in the folder.
                finish_timeout=_CLOSE_SECONDS / 2,
                finish_timeout_raises=True,
            ),
        )
        self._run.define_metric("*", step_metric="step")
        if self._run.offline:
            logger.info("W&B is offline: `wandb sync %s` uploads the run", Path(self._run.dir).parent)
        else:
            logger.info("W&B: %s", self._run.url)

    def log(self, kind: str, step: int, seconds: float | None, values: dict[str, float]) -> None:
        """Add a row, unless W&B has it; a summary becomes the run's."""
        row, time = 2 * step + (kind == "eval"), {} if seconds is None else {"_timestamp": seconds}
        if kind == "summary":
            self._run.summary.update(values)
        elif row >= self._run.starting_step:
            self._run.log({"step": step, **time, **values}, step=row, commit=True)

    def close(self, *, failed: bool) -> None:
        """Upload what is left."""
        self._run.finish(exit_code=int(failed))
        self._wandb.teardown()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""Trackers by name, which is that of the package."""


class TrackerThread:
    """A tracker in a thread of its own: training neither waits for it nor fails with it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._records: SimpleQueue[dict[str, Any] | bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Hand over a record of metrics.jsonl, or another one with `kind` and `step`."""
        if self._thread.is_alive():
            self._records.put(record)

    def close(self, *, failed: bool) -> None:
        """Wait a little for the tracker to end; a run that ended with an error has `failed`."""
        self._records.put(failed)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("log.trackers: %s is not done after %d s", self._name, _CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            tracker = TRACKERS[self._name](self._folder)
            while isinstance(record := self._records.get(), dict):
                kind, step, time_ms = record["kind"], record["step"], record.get("time_ms")
                numbers = {
                    f"{kind}/{key}": value
                    for key, value in flatten_tree(record).items()
                    if type(value) in (int, float) and key not in _KEYS
                }
                tracker.log(kind, step, time_ms and 1e-3 * time_ms, numbers)
            tracker.close(failed=record)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            text = "log.trackers: %s has failed (%s) and gets no more records; metrics.jsonl has all of them"
            logger.warning(text, self._name, reason)
