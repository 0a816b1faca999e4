"""Train CosmoFlow: `python -m cosmoflow_dali.train --config configs/NAME.yaml`.

Without arguments it trains the embedded default: simulated universes, made if they are not there.
The same command runs alone, under mpirun, torchrun and srun. It exits with 0 at the end of
training, with 1 for a fault that it names in one line, and with 75 (EX_TEMPFAIL) when a SIGTERM or
SIGUSR1 has stopped it, while it trains after saving a checkpoint: run it again with --resume.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from mlperf_logging.mllog import constants

from cosmoflow_dali.arguments import Arguments, parse, select_instance
from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.config import TrainConfig
from cosmoflow_dali.mlperf import write_events as mlperf
from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.models.open import OpenCosmoFlow
from cosmoflow_dali.reporting.summary import Result, finish
from cosmoflow_dali.training import run_dir as runs
from cosmoflow_dali.training.checkpoint import Checkpoint
from cosmoflow_dali.training.logs import Console, RunLogs, configure_logging
from cosmoflow_dali.training.trainer import STOP_SIGNALS, Outcome, Trainer
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_split
from pipelines.distributed.cli import launched, report_errors
from pipelines.distributed.session import Session, exit_now
from pipelines.distributed.world import World, available_cores
from pipelines.errors import UserError
from pipelines.loading.input_stats import input_statistics
from pipelines.loading.loader import Loader
from pipelines.loading.reader import Reader
from pipelines.plan import RankSlice
from preprocess.simulate import SETTINGS, make_dataset
from preprocess.staging.stager import describe, stage


@dataclass(frozen=True, slots=True)
class Setup:
    """What rank 0 finds out before training, for all ranks: the same run of the same data."""

    config: TrainConfig
    seed: int
    folder: Path
    checkpoint: Checkpoint | None
    train: SampleDataset
    validation: SampleDataset
    seconds: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    whole = launched()
    with report_errors(whole):
        configure_logging(whole)
        arguments = parse(argv)
        world = whole.partition_ranks(arguments.instances)
        device = world.device(arguments.config.device)
    # From here on rank 0 of each instance prints the errors that all ranks of the instance have seen.
    stopped = "stopped; resume from the last checkpoint with --run-dir RUN --resume"
    with report_errors(world, stopped) as session:
        arguments = select_instance(arguments, world.instance)
        console = Console(speaks=world.is_root)
        configure_logging(world)
        configure_torch(device, world.cores, arguments.config.compute.precision)
        began_ms = arguments.staged_since or round(1e3 * time.time())
        session.connect(device)
        setup = session.run_on_root(lambda: _set_up(arguments, session, console))
        lengths = setup.checkpoint.logs if setup.checkpoint else None
        with RunLogs(setup.folder if world.is_root else None, lengths) as logs:
            if setup.checkpoint is None:
                mlperf.log_init_start(logs.mlperf, began_ms, caches_cleared=arguments.caches_cleared)
            here = setup
            if setup.config.data.stage is not None:
                here = _stage(setup, session, logs, console, arguments.staged_since)
            result = _train(here, session, device, logs, console)
        if result is not None:
            told = setup.folder, setup.config, result, setup.train, setup.validation, world, console
            session.run_on_root(partial(finish, *told))
        if result is None:
            console.say(f"stopped by a signal; go on with --run-dir {setup.folder} --resume")
            return os.EX_TEMPFAIL
    return 0


def _set_up(arguments: Arguments, session: Session, console: Console) -> Setup:
    """Find or make the run's folder and its data, on rank 0."""
    config, checkpoint = arguments.config, None
    folder = arguments.run_dir or Path("runs") / f"{arguments.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with session.stall_guard("looking for a run to go on with"):
        resumes = arguments.resume and (folder / runs.CONFIG).exists()
        if resumes:
            config, checkpoint = runs.go_on(folder, config, session.world.size)
    if config.seed is None:
        config = replace(config, seed=secrets.randbelow(2**31))
    seed = config.seed
    assert seed is not None
    root, simulate, seconds = Path(config.data.dir), config.data.simulate, {}
    # Samples that somebody else has put there are trained on as they are.
    samples = root / "train"
    others = not (root / SETTINGS).exists() and samples.is_dir() and any(samples.iterdir())
    if simulate is not None and not others:
        start = time.perf_counter()
        make_dataset(simulate, root, workers=available_cores(), shown=True)
        seconds["simulate"] = time.perf_counter() - start
    with session.stall_guard("opening the data set"):
        train, validation = open_split(root, "train"), open_split(root, "validation")
    runs.check_data(config, checkpoint, session.world.size, train, validation)
    if resumes:
        runs.save_config(folder, config)
        at = checkpoint.position if checkpoint else "the beginning, for want of a checkpoint"
        console.say(f"going on with {folder} from {at}")
    else:
        runs.begin(folder, config)
        console.say(f"run folder {folder}, seed {seed}")
    return Setup(config, seed, folder, checkpoint, train, validation, seconds)


def _train(
    setup: Setup, session: Session, device: torch.device, logs: RunLogs, console: Console
) -> Result | None:
    """Build everything and train, every rank taking part; None where a signal stopped it."""
    config, seed, checkpoint, world = setup.config, setup.seed, setup.checkpoint, session.world
    start = time.perf_counter()
    model = build_model(config.model, seed)
    if isinstance(model, OpenCosmoFlow) and checkpoint is None:
        reader = Reader(setup.train, config.loader.on_bad_sample)
        apply_log = config.loader.apply_log
        model.fit_input(*session.run_on_root(lambda: input_statistics(reader, apply_log=apply_log)))
    runs.check_shares(checkpoint, setup.train)
    # Ranks that have the same samples share them out; those of other nodes have others.
    readers = world.size // setup.train.num_partitions
    shard = RankSlice(world.rank % readers, readers)
    train = Loader(
        setup.train,
        config.loader,
        rank_slice=shard,
        seed=seed,
        shuffle=config.shuffle,
        ragged="drop",
        device=device,
    )
    validation = Loader(
        setup.validation,
        config.loader,
        rank_slice=shard,
        seed=seed,
        shuffle=False,
        ragged="pad",
        device=device,
    )
    trainer = Trainer(
        config,
        seed,
        model,
        session=session,
        device=device,
        train=train,
        validation=validation,
        folder=setup.folder,
        logs=logs,
        console=console,
        checkpoint=checkpoint,
    )
    if checkpoint is None:
        samples = setup.train.total, setup.validation.total
        mlperf.log_settings(logs.mlperf, config, world, seed=seed, samples=samples)
        logs.mlperf.end(constants.INIT_STOP)
        logs.mlperf.start(constants.RUN_START)
    console.say(trainer.compute_summary)
    seconds = setup.seconds | {"setup": time.perf_counter() - start}
    try:
        outcome = trainer.run()
        if outcome is Outcome.STOPPED:
            return None
        missed = outcome is Outcome.FINISHED and config.target_mae is not None
        logs.mlperf.end(constants.RUN_STOP, metadata={"status": "aborted" if missed else "success"})
        # A run that is resumed after its last epoch has not been evaluated by this process.
        evaluation = trainer.evaluation or trainer.validate()
    finally:
        train.close()
        validation.close()
    clock = trainer.clock
    return Result(
        outcome=outcome,
        evaluation=evaluation,
        skipped=trainer.skipped,
        epochs=trainer.position.epoch,
        steps=trainer.steps,
        compute_summary=trainer.compute_summary,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        wait_fractions=session.gather(clock.total_waited / clock.total if clock.total else 0.0),
        seconds=seconds | trainer.seconds,
    )


def _stage(setup: Setup, session: Session, logs: RunLogs, console: Console, since: int | None) -> Setup:
    """`setup` with both splits on each node's own disk, every rank taking part.

    since: when a job step before this program began with that, in Unix ms, or None.
    """
    config, began = setup.config.data.stage, since or round(1e3 * time.time())
    assert config is not None
    fresh = setup.checkpoint is None
    if fresh:
        logs.mlperf.start("staging_start", time_ms=began)
    splits, trusted = {"train": setup.train, "validation": setup.validation}, since is not None
    (train, of_train), (validation, of_validation) = stage(
        splits, config.folder, config, session, trusted=trusted
    )
    seconds = time.time() - 1e-3 * began
    if fresh:
        mlperf.log_staging(logs.mlperf, seconds, (of_train, of_validation))
    for split, staged in ((train, of_train), (validation, of_validation)):
        console.say(describe(split, staged, session.world.nodes))
        if staged.faults and setup.config.loader.on_bad_sample == "fail":
            raise UserError(f"{staged.faults[0]} ({len(staged.faults)} samples could not be staged)")
    return replace(setup, train=train, validation=validation, seconds=setup.seconds | {"staging": seconds})


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Leave, asked to stop where there is nothing to save; the trainer takes the signals while there is."""
    os._exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    for each in STOP_SIGNALS:
        signal.signal(each, _leave_at_once)
    exit_now(main(), World.detect())
