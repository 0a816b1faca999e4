"""A trace of some steps, which https://ui.perfetto.dev and chrome://tracing show."""

from __future__ import annotations

import gzip
import itertools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import record_function

from cosmoflow_dali.training.checkpoint import Position
from cosmoflow_dali.training.run_dir import Run
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, UserError
from pipelines.io import write_file
from pipelines.sample import Batch

logger = logging.getLogger(__name__)


def check_profile(run: Run, ranks: int) -> None:
    """Raise ConfigError unless the steps of `run.profile` are among those that are left.

    Staging may leave an epoch with fewer steps than are reckoned here.
    """
    if not run.profile:
        return
    first, last, batch = run.profile[0], run.profile[-1], run.config.samples_per_step(ranks)
    steps_per_epoch = len(run.train) // batch
    at = run.checkpoint.position if run.checkpoint is not None else Position()
    done, total = at.epoch * steps_per_epoch + at.samples // batch, run.config.epochs * steps_per_epoch
    if not done < first <= last <= total:
        left = f"the steps left are {done + 1} to {total}" if done < total else "no step is left"
        raise ConfigError("--profile", f"{first}:{last}", f"{left}; name some of them")


class StepTrace:
    """Records `run.profile` on rank 0, as a context around training, and writes one file at the last step."""

    def __init__(self, run: Run, world: World) -> None:
        self._steps, self._folder = run.profile if world.is_root else range(0), run.folder
        self._profile: torch.profiler.profile | None = None

    def follow(self, batches: Iterator[Batch], done: int) -> Iterator[Batch]:
        """Iterate over `batches`, one for each step after `done`; record the steps that were asked for."""
        return self._follow(batches, done) if self._steps else batches

    def _follow(self, batches: Iterator[Batch], done: int) -> Iterator[Batch]:
        first, last = self._steps[0], self._steps[-1]
        for step in itertools.count(done + 1):
            if step == first:
                self._profile = profile = torch.profiler.profile()
                profile.start()
            with record_function("data wait"):
                batch = next(batches, None)
            if batch is None:
                if step == first:
                    # It is the next epoch's.
                    profile.stop()
                    self._profile = None
                return
            with record_function(f"step {step}"):
                yield batch
            if step == last:
                self._stop()

    def _stop(self) -> None:
        """Write what has been recorded."""
        steps, self._steps = self._steps, range(0)
        profile, self._profile = self._profile, None
        if profile is None:
            return
        path = self._folder / f"trace_{steps[0]}-{steps[-1]}.json.gz"
        try:
            profile.stop()
            with tempfile.TemporaryDirectory() as scratch:
                exported = Path(scratch) / "trace.json"
                profile.export_chrome_trace(str(exported))
                write_file(path, gzip.compress(exported.read_bytes()))
        except (OSError, RuntimeError, UserError) as error:
            # The run is worth more than its trace.
            logger.warning("--profile: there is no trace (%s)", error)
        else:
            logger.info("trace %s; https://ui.perfetto.dev shows it", path)

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *error: object) -> None:
        if self._steps and self._profile is None:
            logger.warning("--profile: training has ended before step %d; there is no trace", self._steps[0])
        self._stop()
