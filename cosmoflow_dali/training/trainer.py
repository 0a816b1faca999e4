"""The training loop.

The ranks agree on everything in one place, `_sync_ranks`, every `log.every` steps: the mean loss,
whether it is finite, whether a rank has skipped a damaged sample, and whether a rank was asked to
stop. Between two of these a step waits neither for the device nor, except for the gradients, for
other ranks.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from contextlib import closing
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mlperf_logging.mllog import constants
from torch.autograd.profiler import emit_nvtx

from cosmoflow_dali.compute import augment
from cosmoflow_dali.compute.engines import make_engine, wrap_model
from cosmoflow_dali.compute.optim import build_optimizer, describe, restore_optimizer, set_lr
from cosmoflow_dali.compute.schedule import lr_at
from cosmoflow_dali.compute.step import autocast, input_dtype, make_scaler, seed_step
from cosmoflow_dali.models.build import Model
from cosmoflow_dali.training.checkpoint import Checkpoint, Position
from cosmoflow_dali.training.evaluation import Evaluation, evaluate
from cosmoflow_dali.training.logs import Progress, RunLogs
from cosmoflow_dali.training.run_dir import CHECKPOINTS, Run
from cosmoflow_dali.training.step_trace import StepTrace
from cosmoflow_dali.training.stop_signal import StopReason, StopSignal
from cosmoflow_dali.training.timer import StepTimer
from pipelines.distributed.session import Session
from pipelines.errors import UserError
from pipelines.loading.loader import Loader
from pipelines.sample import Batch

logger = logging.getLogger(__name__)


class Trainer:
    """Training of a network on one rank.

    Attributes:
        compute_summary: Optimizer, engine and precision, for logs.
        evaluation: Validation of the newest epoch of this process, or None.
        position: Position of the next sample to train on.
        seconds: Time spent in "train" and "evaluate", over all processes of this run.
        timer: Time of this process's training steps.
    """

    def __init__(
        self,
        run: Run,
        model: Model,
        train: Loader,
        validation: Loader,
        *,
        session: Session,
        device: torch.device,
        logs: RunLogs,
    ) -> None:
        self._run, self._config, self._train, self._validation = run, run.config, train, validation
        self._session, self._device, self._logs = session, device, logs
        self._global_batch = self._config.samples_per_step(session.world.size)
        self._model = model.to(device)
        compute = self._config.compute
        precision, engine = compute.precision, compute.engine_on(device)
        self._optimizer = build_optimizer(self._config.optimizer, self._model, precision, engine)
        self._scaler = make_scaler(precision, device)
        self.compute_summary = (
            f"{describe(self._optimizer, self._config.optimizer, device, precision, engine)}, "
            f"{engine} engine, {precision} on {device.type}"
            + (f", {blocks} checkpointed blocks" if (blocks := compute.checkpoint_blocks) else "")
        )
        self.evaluation: Evaluation | None = None
        self.position, self.seconds = Position(), {"train": 0.0, "evaluate": 0.0}
        self.timer, self._progress, self._stop = StepTimer(), Progress(), StopSignal()
        self._skipped: dict[str, list[str]] = {"train": [], "validation": []}
        self._scores: dict[str, Any] | None = None
        # Loss and sample indices of each step since the ranks synchronized.
        self._window: list[tuple[torch.Tensor, npt.NDArray[np.int64]]] = []
        if run.checkpoint is not None:
            self._restore(run.checkpoint)
        self._trace = StepTrace(run, session.world)
        self._parallel = wrap_model(self._model, compute, device, ranks=session.world.size)
        shape = self._config.loader.batch_size, *train.shape
        self._engine = make_engine(self._parallel, compute, self._optimizer, self._scaler, shape, device)

    @property
    def steps(self) -> int:
        """Number of steps since the beginning of the run."""
        return self.position.epoch * len(self._train) + self.position.samples // self._global_batch

    @property
    def skipped(self) -> dict[str, int]:
        """Number of damaged samples of each split skipped since the beginning of the run."""
        return {split: len(paths) for split, paths in self._skipped.items()}

    def run(self) -> StopReason:
        """Train to the target quality, the last epoch, or a signal."""
        if reason := self._finished():
            logger.info("the run has done %s (%s): nothing is left to train", self.position, reason.value)
            self._log_run_stop(reason, self._logs.run_stop_ms)
            return reason
        with closing(self._engine), self._stop, self._trace, emit_nvtx(enabled=self._config.compute.nvtx):
            while not (reason := self._finished()):
                if not self._train_epoch():
                    return StopReason.STOPPED
                self._end_epoch()
            return reason

    def validate(self) -> Evaluation:
        """Score the network on the validation split; raise UserError if an output is not finite."""
        compute, epoch = self._config.compute, self.position.epoch
        with autocast(compute.precision, self._device):
            return evaluate(self._model, self._validation, self._session, epoch, compute.micro_batch)

    def _finished(self) -> StopReason | None:
        """Return why there is no step left to train, or None if there is one."""
        target, scores = self._config.target_mae, self._scores
        if self.position.samples:
            return None  # The scores are those of the epoch before.
        if target is not None and scores is not None and scores["mae"] <= target:
            return StopReason.REACHED
        return StopReason.FINISHED if self.position.epoch >= self._config.epochs else None

    def _log_run_stop(self, reason: StopReason, time_ms: int | None = None) -> None:
        """Log the end of the run: at `time_ms` (Unix ms), that of an earlier process, or now."""
        missed = reason is StopReason.FINISHED and self._config.target_mae is not None
        self._logs.mlperf.end(
            constants.RUN_STOP, metadata={"status": "aborted" if missed else "success"}, time_ms=time_ms
        )

    def _train_epoch(self) -> bool:
        """Train the rest of the current epoch; return False if a signal stopped it."""
        epoch, log, steps = self.position.epoch, self._config.log, len(self._train)
        first = self.position.samples // self._global_batch
        if first == 0:
            self._logs.mlperf.start(constants.EPOCH_START, metadata={"epoch_num": epoch + 1})
        self._parallel.train()
        self.timer.reset()
        loaded = self._trace.follow(self._train.batches(epoch, first, self._engine.inputs), self.steps)
        guarded = self._session.with_stall_guard(loaded, "waiting for a training sample")
        with self._progress.epoch(f"epoch {epoch + 1}/{self._config.epochs}", first, steps):
            for batch in self.timer.waiting(self._session.tag_rank_errors(guarded)):
                self._step(batch)
                saves = self.steps % log.checkpoint_every == 0
                if saves or self.steps % log.every == 0 or self.steps == (epoch + 1) * steps:
                    stopped = self._sync_ranks()
                    if stopped or saves:
                        self._save()
                        self.timer.reset()
                    if stopped:
                        return False
        return True

    def _step(self, batch: Batch) -> None:
        """Update the weights once."""
        config, steps_per_epoch = self._config, len(self._train)
        epoch, step = self.position.epoch, self.steps - self.position.epoch * steps_per_epoch
        lr = lr_at(config.schedule, step=self.steps, steps_per_epoch=steps_per_epoch, epochs=config.epochs)
        set_lr(self._optimizer, lr)
        # Ranks that share samples drop the same activations.
        seed_step(self._run.seed, epoch, step, self._session.world.rank // config.parallel.spatial)
        if config.symmetries:
            number = augment.draw(self._run.seed, epoch, step)
            group, periodic = self._model.group, self._model.periodic
            turned = augment.apply(batch.volume, config.symmetries, number, group, periodic=periodic)
            batch = dataclasses.replace(batch, volume=turned)
        self._window.append((self._engine(batch), batch.index))
        self.position = Position(epoch, self.position.samples + self._global_batch)

    def _sync_ranks(self) -> bool:
        """Log the steps since the last call; return whether any rank was asked to stop."""
        has_skipped = bool(self._train.skipped.keys() - set(self._skipped["train"]))
        flags = torch.tensor([self._stop.received, has_skipped], dtype=torch.float32).to(self._device)
        values = torch.stack([*(loss for loss, _ in self._window), *flags]).double()
        *losses, stopped, skipped = (self._session.sum(values) / self._session.world.size).tolist()
        if skipped:
            self._log_skipped()
        self._check_finite(losses)
        self._window.clear()
        self._log_steps(losses)
        return stopped > 0

    def _log_steps(self, losses: list[float]) -> None:
        """Log steps that had the mean `losses` over all ranks."""
        seconds, waited = self.timer.read()
        self.seconds["train"] += seconds
        count, loss = len(losses), sum(losses) / len(losses)
        rate = count * self._global_batch / seconds
        record = self._record(
            "step",
            loss=loss,
            lr=self._optimizer.param_groups[0]["lr"],
            samples_per_s=rate,
            data_wait_ms=1e3 * waited / count,
            step_ms=1e3 * seconds / count,
        )
        with self._session.own_errors(), self._session.stall_guard("writing metrics.jsonl"):
            self._logs.metric(record)
        left = (self._config.epochs * len(self._train) - self.steps) * self._global_batch / rate
        self._progress.advance(
            count,
            f"step {self.steps}: loss {loss:.4f}, {rate:.1f} samples/s, data wait {waited / seconds:.0%}, "
            f"{timedelta(seconds=round(left))} left",
        )

    def _record(self, kind: str, **values: Any) -> dict[str, Any]:
        """Return a record of metrics.jsonl at the current position."""
        place = {"step": self.steps, "epoch": self.position.epoch, "samples": self.steps * self._global_batch}
        return {"kind": kind, **place, **values}

    def _check_finite(self, losses: list[float]) -> None:
        """Raise, on every rank, an error about the first of `losses` that is not finite."""
        bad = np.flatnonzero(~np.isfinite(losses)).tolist()
        if bad:
            index = self._window[bad[0]][1]
            largest = torch.finfo(input_dtype(self._config.compute.precision)).max
            self._session.run_on_all_ranks(lambda: self._train.raise_if_damaged(index, largest=largest))
            # A target far out of range makes the loss of the next step infinite, too.
            indices = np.concatenate([step[1] for step in self._window[max(bad[0] - 1, 0) : bad[0] + 1]])
            self._session.run_on_all_ranks(lambda: self._train.raise_if_out_of_range(indices))
            step = self.steps - len(losses) + bad[0] + 1
            raise UserError(
                f"the loss is {losses[bad[0]]} at step {step} (epoch {self.position.epoch + 1}), and the "
                "samples of that step are valid: training has diverged; lower the learning rate"
            )

    def _end_epoch(self) -> None:
        """Evaluate, log and save the epoch that was just trained."""
        epoch, log = {"epoch_num": self.position.epoch + 1}, self._logs.mlperf
        start = time.perf_counter()
        log.start(constants.EVAL_START, metadata=epoch)
        self.evaluation = evaluation = self.validate()
        self._log_skipped()
        log.end(constants.EVAL_STOP, metadata=epoch)
        self.seconds["evaluate"] += time.perf_counter() - start
        mae, each = evaluation.mae, evaluation.mae_per_parameter
        self._scores = evaluation.scores() | {"residual_rms": evaluation.residual_rms}
        log.event("eval_error", value=mae, metadata=epoch)
        log.end(constants.EPOCH_STOP, metadata=epoch)
        figures = {"mae": mae, "mse": evaluation.mse, "mae_per_parameter": each}
        self._logs.metric(self._record("eval", **figures, skipped_samples=self.skipped))
        parameters = ", ".join(f"{name} {value:.3f}" for name, value in each.items())
        logger.info("epoch %d: validation MAE %.4f (%s)", epoch["epoch_num"], mae, parameters)
        self.position = Position(epoch["epoch_num"])
        if reason := self._finished():
            self._log_run_stop(reason)
        self._save()

    def _log_skipped(self) -> None:
        """Log and count each sample that any rank has skipped, once."""
        for split, loader in (("train", self._train), ("validation", self._validation)):
            known = self._skipped[split]
            for faults in self._session.gather(loader.skipped):
                for path in sorted(faults.keys() - set(known)):
                    known.append(path)
                    logger.info("skipped %s", faults[path])

    def _save(self) -> None:
        if not self._session.world.is_root:
            return
        with self._session.own_errors(), self._session.stall_guard("writing the logs"):
            lengths, mlperf_log = self._logs.sync()
        checkpoint = Checkpoint(
            config=dataclasses.asdict(self._config),
            seed=self._run.seed,
            global_batch=self._global_batch,
            train_samples=self._train.split.total,
            fingerprints=self._run.fingerprints,
            division=self._train.split.partition_signature,
            position=self.position,
            model=self._model.state_dict(),
            optimizer=self._optimizer.state_dict(),
            scaler=self._scaler.state_dict() or None,
            scores=self._scores,
            seconds=dict(self.seconds),
            skipped=self._skipped,
            logs=lengths,
            mlperf_log=mlperf_log,
            kernels=self._run.kernels,
        )
        with self._session.own_errors(), self._session.stall_guard("writing a checkpoint"):
            checkpoint.save(self._run.folder / CHECKPOINTS)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._model.load_state_dict(checkpoint.model)
        restore_optimizer(self._optimizer, checkpoint.optimizer)
        if checkpoint.scaler is not None:
            self._scaler.load_state_dict(checkpoint.scaler)
        self.position, self.seconds = checkpoint.position, dict(checkpoint.seconds)
        self._scores = checkpoint.scores
        self._skipped |= checkpoint.skipped
