"""The training loop: batches in, a trained network and its logs out.

Everything the ranks must agree on is settled at one place, `_compare_notes`, every `log.every`
steps: the mean loss, whether it is a number, whether somebody has passed over a damaged sample, and
whether somebody asked to stop. Between these places a step never waits for the device or for another
rank, but for the gradients.
"""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mlperf_logging.mllog import constants
from torch import nn
from torch.autograd.profiler import emit_nvtx
from torch.profiler import record_function

from cosmoflow_dali.compute import augment
from cosmoflow_dali.compute.engines import make_engine, wrap_model
from cosmoflow_dali.compute.optim import build_optimizer, describe, restore_optimizer, set_lr
from cosmoflow_dali.compute.schedule import lr_at
from cosmoflow_dali.compute.step import autocast, make_scaler, seed_step
from cosmoflow_dali.config import TrainConfig
from cosmoflow_dali.training.checkpoint import Checkpoint, Position
from cosmoflow_dali.training.evaluation import Evaluation, evaluate
from cosmoflow_dali.training.logs import Console, RunLogs
from cosmoflow_dali.training.timer import Clock
from pipelines.distributed.session import Session
from pipelines.errors import UserError
from pipelines.loading.loader import Loader
from pipelines.sample import Batch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Asked to stop by either: mpirun hands on the second, and ends its ranks itself at the first."""


class Outcome(Enum):
    """How training ended."""

    REACHED = "reached"
    """The target quality was reached."""
    FINISHED = "finished"
    """All epochs are done."""
    STOPPED = "stopped"
    """A signal asked for it; a checkpoint holds the place."""


class Trainer:
    """One rank's part in training `model`.

    evaluation: the validation of the newest whole epoch of this process, or None.
    position: of the next sample to train on.
    compute_summary: the optimizer, the engine and the precision, for a person to read.
    seconds: spent in "train" and "evaluate", over all processes that worked on this run.
    """

    def __init__(
        self,
        config: TrainConfig,
        seed: int,
        model: nn.Module,
        *,
        session: Session,
        device: torch.device,
        train: Loader,
        validation: Loader,
        folder: Path,
        logs: RunLogs,
        console: Console,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._config, self._seed, self._session, self._device = config, seed, session, device
        self._train, self._validation = train, validation
        self._folder, self._logs, self._console = folder, logs, console
        self._global_batch = config.loader.batch_size * session.world.size
        self._model = model.to(device)
        self._optimizer = build_optimizer(config.optimizer, self._model)
        compute = config.compute
        self._scaler = make_scaler(compute.precision, device)
        how = f"{compute.engine_on(device)} engine, {compute.precision} on {device.type}"
        self.compute_summary = f"{describe(self._optimizer, config.optimizer, device)}, {how}"
        self.position = Position()
        self.seconds = {"train": 0.0, "evaluate": 0.0}
        self.evaluation: Evaluation | None = None
        self.clock = Clock()
        self._skipped: dict[str, list[str]] = {"train": [], "validation": []}
        self._scores: dict[str, Any] | None = None
        self._window: list[tuple[torch.Tensor, npt.NDArray[np.int64]]] = []
        self._stop_asked = False
        if checkpoint is not None:
            self._restore(checkpoint)
        self._parallel = wrap_model(self._model, compute, device, ranks=session.world.size)
        self._gradients = make_engine(
            self._parallel, compute, self._scaler, train.split.spec, config.loader.batch_size, device
        )

    @property
    def steps(self) -> int:
        """Steps done since the beginning of the run."""
        return self.position.epoch * len(self._train) + self.position.samples // self._global_batch

    @property
    def skipped(self) -> dict[str, int]:
        """How many damaged samples of each split were passed over since the beginning of the run."""
        return {split: len(paths) for split, paths in self._skipped.items()}

    def run(self) -> Outcome:
        """Train to the target, the last epoch, or a signal."""
        earlier = {number: signal.signal(number, self._ask_to_stop) for number in STOP_SIGNALS}
        try:
            with emit_nvtx(enabled=self._config.compute.nvtx):
                return self._epochs()
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _epochs(self) -> Outcome:
        while not self._reached():
            if self.position.epoch == self._config.epochs:
                return Outcome.FINISHED
            if not self._train_epoch():
                return Outcome.STOPPED
            self._end_epoch()
        return Outcome.REACHED

    def validate(self) -> Evaluation:
        """Score the model on the validation split; UserError where an answer is no number."""
        with autocast(self._config.compute.precision, self._device):
            return evaluate(self._model, self._validation, self._session, epoch=self.position.epoch)

    def _train_epoch(self) -> bool:
        """Train the rest of the current epoch; False if a signal cut it short."""
        epoch, config = self.position.epoch, self._config
        first, steps = self.position.samples // self._global_batch, len(self._train)
        if first == 0:
            self._logs.mlperf.start(constants.EPOCH_START, metadata={"epoch_num": epoch + 1})
        self._console.start_epoch(epoch, config.epochs, first, steps)
        self._parallel.train()
        self.clock.reset()
        try:
            loaded = self._train.batches(epoch, first, self._gradients.inputs)
            timely = self._session.with_stall_guard(loaded, "waiting for a training sample")
            batches = self.clock.waiting(self._session.tag_rank_errors(timely))
            for step, batch in enumerate(batches, first):
                self._step(epoch, step, batch)
                self.position = Position(epoch, (step + 1) * self._global_batch)
                done = step + 1
                saves = self.steps % config.log.checkpoint_every == 0
                if saves or self.steps % config.log.every == 0 or done == steps:
                    stop = self._compare_notes()
                    if stop or saves:
                        self._save()
                        self.clock.reset()
                    if stop:
                        return False
        finally:
            self._console.end_epoch()
        return True

    def _step(self, epoch: int, step: int, batch: Batch) -> None:
        """One update of the weights."""
        config = self._config
        lr = lr_at(
            config.schedule,
            step=epoch * len(self._train) + step,
            steps_per_epoch=len(self._train),
            epochs=config.epochs,
        )
        set_lr(self._optimizer, lr)
        seed_step(self._seed, epoch, step, self._session.world.rank)
        if config.symmetries:
            turned = augment.apply(batch.volume, augment.draw(self._seed, epoch, step))
            batch = replace(batch, volume=turned)
        loss = self._gradients(batch)
        with record_function("update"):
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._window.append((loss, batch.index))

    def _compare_notes(self) -> bool:
        """Log the steps since the last time; whether any rank was asked to stop."""
        losses, own = [loss for loss, _ in self._window], (self._stop_asked, self._has_skipped_more())
        notes = torch.stack([*losses, *torch.tensor(own, dtype=torch.float32).to(self._device)]).double()
        *means, stops, news = (self._session.sum(notes) / self._session.world.size).tolist()
        if news:
            self._tell_of_skipped()
        self._refuse_nan(means)
        seconds, waited = self.clock.read()
        self.seconds["train"] += seconds
        self._window.clear()
        rate = len(means) * self._global_batch / seconds
        record = {
            "kind": "step",
            "step": self.steps,
            "epoch": self.position.epoch,
            "samples": self.steps * self._global_batch,
            "loss": sum(means) / len(means),
            "lr": self._optimizer.param_groups[0]["lr"],
            "samples_per_s": rate,
            "data_wait_ms": 1e3 * waited / len(means),
            "step_ms": 1e3 * seconds / len(means),
        }
        with self._session.stall_guard("writing metrics.jsonl"):
            self._logs.metric(record)
        self._console.advance(
            len(means),
            time.monotonic(),
            lambda: (
                f"step {self.steps}: loss {record['loss']:.4f}, {rate:.1f} samples/s, "
                f"data wait {waited / seconds:.0%}, {self._time_left(rate)} left"
            ),
        )
        return stops > 0

    def _time_left(self, rate: float) -> str:
        steps = self._config.epochs * len(self._train) - self.steps
        minutes, seconds = divmod(round(steps * self._global_batch / rate), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    def _refuse_nan(self, means: list[float]) -> None:
        """Raise, on every rank, what made the first loss among `means` that is not a number."""
        bad = np.flatnonzero(~np.isfinite(means)).tolist()
        if not bad:
            return
        index = self._window[bad[0]][1]
        self._session.run_on_all_ranks(lambda: self._train.raise_if_damaged(index))
        step = self.steps - len(means) + bad[0] + 1
        raise UserError(
            f"the loss is {means[bad[0]]} at step {step} (epoch {self.position.epoch + 1}), and the samples "
            "of that step are sound: training has diverged; lower the learning rate"
        )

    def _end_epoch(self) -> None:
        """Evaluate, log and save the epoch that has just been trained."""
        epoch, log = {"epoch_num": self.position.epoch + 1}, self._logs.mlperf
        start = time.perf_counter()
        log.start(constants.EVAL_START, metadata=epoch)
        self.evaluation = self.validate()
        self._tell_of_skipped()
        log.end(constants.EVAL_STOP, metadata=epoch)
        self.seconds["evaluate"] += time.perf_counter() - start
        self._scores = self.evaluation.scores() | {"residual_rms": self.evaluation.residual_rms}
        log.event("eval_error", value=self.evaluation.mae, metadata=epoch)
        log.end(constants.EPOCH_STOP, metadata=epoch)
        self._logs.metric(
            {
                "kind": "eval",
                "step": self.steps,
                "epoch": self.position.epoch,
                "samples": self.steps * self._global_batch,
                "mae": self.evaluation.mae,
                "mse": self.evaluation.mse,
                "mae_per_parameter": self.evaluation.mae_per_parameter,
                "skipped_samples": self.skipped,
            }
        )
        each = ", ".join(f"{name} {mae:.3f}" for name, mae in self.evaluation.mae_per_parameter.items())
        self._console.say(
            f"epoch {self.position.epoch + 1}: validation MAE {self.evaluation.mae:.4f} ({each})"
        )
        self.position = Position(self.position.epoch + 1)
        self._save()

    def _has_skipped_more(self) -> bool:
        """Whether this rank has passed over training samples that nobody has told of."""
        return bool(self._train.skipped.keys() - set(self._skipped["train"]))

    def _tell_of_skipped(self) -> None:
        """Name each sample that some rank has passed over, once, and count it."""
        for split, loader in (("train", self._train), ("validation", self._validation)):
            told = self._skipped[split]
            for faults in self._session.gather(loader.skipped):
                for path in sorted(faults.keys() - set(told)):
                    told.append(path)
                    self._console.say(f"skipped {faults[path]}")

    def _reached(self) -> bool:
        target = self._config.target_mae
        return target is not None and self._scores is not None and self._scores["mae"] <= target

    def _save(self) -> None:
        if not self._session.world.is_root:
            return
        state = Checkpoint(
            config=asdict(self._config),
            seed=self._seed,
            global_batch=self._global_batch,
            train_samples=self._train.split.total,
            division=self._train.split.partition_signature,
            position=self.position,
            model=self._model.state_dict(),
            optimizer=self._optimizer.state_dict(),
            scaler=self._scaler.state_dict() or None,
            scores=self._scores,
            seconds=dict(self.seconds),
            skipped=self._skipped,
            logs=self._logs.lengths(),
        )
        with self._session.stall_guard("writing a checkpoint"):
            state.save(self._folder / "checkpoints")

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._model.load_state_dict(checkpoint.model)
        restore_optimizer(self._optimizer, checkpoint.optimizer)
        if checkpoint.scaler is not None:
            self._scaler.load_state_dict(checkpoint.scaler)
        self.position, self.seconds = checkpoint.position, dict(checkpoint.seconds)
        self._scores = checkpoint.scores
        self._skipped |= checkpoint.skipped

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_asked = True
