"""Train CosmoFlow: `python -m cosmoflow_dali.train --config configs/NAME.yaml`.

Without arguments it trains on the embedded default data set, simulated if it does not exist yet.
The same command runs alone and under mpirun, torchrun and srun. The exit status is 0 at the end of
training, 1 for an error that it names in one line, and 75 (EX_TEMPFAIL) if SIGTERM, SIGUSR1 or
SIGHUP stopped it; during training it saves a checkpoint first, and --resume continues.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
from mlperf_logging.mllog import constants

from cosmoflow_dali.arguments import Arguments, parse, select_instance
from cosmoflow_dali.compute.kernels import choose_kernels, use_kernels
from cosmoflow_dali.compute.preflight import check_convolutions
from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.mlperf.write_events import log_settings
from cosmoflow_dali.models.build import Model, build_model
from cosmoflow_dali.models.open import OpenCosmoFlow
from cosmoflow_dali.reporting.posteriors import fit_run
from cosmoflow_dali.reporting.summary import write_results
from cosmoflow_dali.training.evaluation import Evaluation
from cosmoflow_dali.training.fill_cache import fill_cache
from cosmoflow_dali.training.loaders import open_loaders
from cosmoflow_dali.training.logs import RunLogs, configure_logging
from cosmoflow_dali.training.run_data import (
    check_data,
    check_partition,
    check_symmetries,
    open_data,
    simulate_missing,
)
from cosmoflow_dali.training.run_dir import CONFIG, Run, create_run, lock_run, resume_run, save_config
from cosmoflow_dali.training.step_trace import check_profile
from cosmoflow_dali.training.stop_signal import StopReason, handle_stop_signals
from cosmoflow_dali.training.trackers import check_installed
from cosmoflow_dali.training.trainer import Trainer
from pipelines.distributed.cli import launched, report_errors
from pipelines.distributed.node_groups import check_nodes
from pipelines.distributed.sample_groups import consecutive_ranks
from pipelines.distributed.session import Session, exit_now
from pipelines.distributed.world import World
from pipelines.errors import UserError
from pipelines.filesystem import provide_scratch
from pipelines.loading.input_stats import input_statistics
from pipelines.loading.reader import Reader
from pipelines.storage.requests import COUNTS, TransferCounts
from preprocess.staging.stager import describe, stage

# As a program, this module's name is __main__.
logger = logging.getLogger("cosmoflow_dali.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    job = launched()
    with report_errors(job) as session:
        configure_logging(job)
        arguments = parse(argv)
        if arguments.instances > 1:
            # The error does not occur on rank 0, so each rank that has it prints it.
            with session.own_errors():
                job.check_order()
        world = job.partition_ranks(arguments.instances)
        device = world.device(arguments.config.device)
    # From here on rank 0 of each instance prints the errors that all ranks of the instance have seen.
    stopped = "stopped; resume from the last checkpoint with --run-dir RUN --resume"
    with report_errors(world, stopped) as session, ExitStack() as locks:
        configure_logging(world)
        arguments = select_instance(arguments, world.instance)
        configure_torch(device, world.cores, arguments.config.compute.precision)
        start_ms = arguments.staged_since or round(1e3 * time.time())
        session.connect(device)
        check_nodes(session)
        run = session.run_on_root(lambda: _prepare_run(arguments, session, locks))
        provide_scratch(run.folder)
        saved = (run.checkpoint.logs, run.checkpoint.mlperf_log) if run.checkpoint else ({}, "")
        with RunLogs(run.folder if world.is_root else None, *saved, run.config.log.trackers) as logs:
            if run.checkpoint is None:
                logs.mlperf.event(constants.CACHE_CLEAR, value=arguments.caches_cleared, time_ms=start_ms)
                logs.mlperf.start(constants.INIT_START, time_ms=start_ms)
            model = _build_model(run, session)
            staged = _stage(run, session, logs, arguments.staged_since)
            staged = fill_cache(staged, session, logs, periodic=model.periodic)
            result = _train(staged, model, session, device, logs)
            if result is None:
                logger.info("stopped by a signal; resume with --run-dir %s --resume", run.folder)
                return os.EX_TEMPFAIL
            # Posteriors and baseline read the whole data set, not this node's part of it.
            evaluation, training, weights = result
            posterior = fit_run(run, weights, device, session) if run.calibration is not None else None
            write = partial(write_results, run, evaluation, training, posterior, world)
            logs.summarize(session.run_on_root(write))
    return 0


def _prepare_run(arguments: Arguments, session: Session, locks: ExitStack) -> Run:
    """Create or resume the run folder, locked in `locks`, and simulate missing data, on rank 0."""
    folder, config, checkpoint, seconds = arguments.run_dir, arguments.config, None, {}
    with session.stall_guard("looking for a run to resume"):
        resumes = arguments.resume and (folder / CONFIG).exists()
        if resumes:
            locks.enter_context(lock_run(folder))
            config, checkpoint = resume_run(folder, config, session.world.size)
    check_installed(config.log.trackers)
    if config.seed is None:
        config = dataclasses.replace(config, seed=secrets.randbelow(2**31))
    # Before hours of simulation.
    config.samples_per_step(session.world.size)
    start = time.perf_counter()
    if simulate_missing(config):
        seconds["simulate"] = time.perf_counter() - start
    with session.stall_guard("opening the data set"):
        train, validation, calibration, test = open_data(config, session.world)
        fingerprints = {"train": train.fingerprint(), "validation": validation.fingerprint()}
    run = Run(
        folder,
        config,
        checkpoint,
        train,
        validation,
        fingerprints,
        seconds,
        calibration=calibration,
        test=test,
        profile=arguments.profile,
    )
    check_data(run, session.world)
    check_symmetries(run)
    check_profile(run, session.world.size)
    if not resumes:
        run = create_run(run, locks, must_be_new=arguments.must_be_new)
        logger.info("run folder %s, seed %d", run.folder, run.seed)
        return run
    save_config(folder, config)
    if checkpoint is None:
        logger.info("resuming %s from the beginning, as it has no checkpoint", folder)
    else:
        logger.info("resuming %s after %s", folder, checkpoint.position)
    return run


def _build_model(run: Run, session: Session) -> Model:
    """Return the network with its initial weights and, unless it is resumed, the statistics of its input.

    They are of whole samples, which a staged copy may not have.
    """
    config = run.config
    model = build_model(config.model, run.seed, config.compute.checkpoint_blocks)
    if isinstance(model, OpenCosmoFlow) and run.checkpoint is None:
        apply_log = config.loader.apply_log
        reader = Reader(run.train, config.loader.on_bad_sample, apply_log=apply_log)
        model.fit_input(*session.run_on_root(lambda: input_statistics(reader, apply_log=apply_log)))
    return model


def _stage(run: Run, session: Session, logs: RunLogs, staged_since: int | None) -> Run:
    """Copy both splits to each node's own disk, if `data.stage` is set; return the run on these copies.

    All ranks take part. `staged_since` is the start of staging in an earlier job step, in Unix ms.
    """
    config = run.config.data.stage
    if config is None:
        return run
    start_ms = staged_since or round(1e3 * time.time())
    if run.checkpoint is None:
        logs.mlperf.start("staging_start", time_ms=start_ms)
    splits = {"train": run.train, "validation": run.validation}
    # Nodes whose ranks hold a part of each sample need no more of it.
    nodes_per_sample, left = divmod(run.config.parallel.spatial, session.world.local_size)
    staged = stage(
        splits,
        config.folder,
        config,
        session,
        nodes_per_sample=1 if left else nodes_per_sample,
        skip_source_check=staged_since is not None,
    )
    seconds = time.time() - 1e-3 * start_ms
    if run.checkpoint is None:
        names = "samples", "read_bytes", "written_bytes"
        totals = {name: sum(getattr(report, name) for _, report in staged) for name in names}
        logs.mlperf.end("staging_stop", metadata={"staging_duration": seconds} | totals)
    for split, report in staged:
        logger.info(describe(split, report, session.world.nodes))
        if report.faults and run.config.loader.on_bad_sample == "fail":
            raise UserError(f"{report.faults[0]} ({len(report.faults)} samples could not be staged)")
    (train, _), (validation, _) = staged
    seconds_by_phase = run.seconds | {"staging": seconds}
    return dataclasses.replace(run, train=train, validation=validation, seconds=seconds_by_phase)


def _train(
    run: Run, model: Model, session: Session, device: torch.device, logs: RunLogs
) -> tuple[Evaluation, dict[str, Any], dict[str, Any]] | None:
    """Train `model` on all ranks.

    Returns:
        Validation of the final weights, the entries of summary.json about the training, and the state dict of
        the network; None if a signal stopped it.
    """
    start, config, world = time.perf_counter(), run.config, session.world
    check_partition(run)
    model.group = consecutive_ranks(config.parallel.spatial)
    with open_loaders(run, session, device, periodic=model.periodic) as (train, validation):
        run = dataclasses.replace(run, kernels=_use_kernels(run, model, session, device))
        trainer = Trainer(run, model, train, validation, session=session, device=device, logs=logs)
        if run.checkpoint is None:
            samples = run.train.total, run.validation.total
            log_settings(logs.mlperf, config, world, seed=run.seed, samples=samples)
            logs.mlperf.end(constants.INIT_STOP)
            logs.mlperf.start(constants.RUN_START)
        logger.info(trainer.compute_summary)
        seconds = run.seconds | {"setup": time.perf_counter() - start}
        reason = trainer.run()
        if reason is StopReason.STOPPED:
            return None
        # A run that is resumed after its last epoch was not evaluated by this process.
        evaluation = trainer.evaluation or trainer.validate()
    timer = trainer.timer
    waits = session.gather(timer.total_waited / timer.total if timer.total else 0.0)
    transfers = [sum(counts) for counts in zip(*session.gather(dataclasses.astuple(COUNTS)), strict=True)]
    summary = {
        "skipped_samples": trainer.skipped,
        "outcome": reason.value,
        "epochs": trainer.position.epoch,
        "steps": trainer.steps,
        "computes": trainer.compute_summary,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data_wait_fraction": {"mean": statistics.fmean(waits), "worst_rank": max(waits)},
        "transfers": dataclasses.asdict(TransferCounts(*transfers)) if any(transfers) else None,
        "seconds": seconds | trainer.seconds,
    }
    return evaluation, summary, model.state_dict()


def _use_kernels(run: Run, model: Model, session: Session, device: torch.device) -> list[str]:
    """Compute the blocks of `model` with the checkpoint's kernels, or those that rank 0 chooses.

    Ranks with another model of GPU choose their own, as those of rank 0 may be slow or fail there. All
    kernels give gradients of the same layout, so the ranks' average is not affected.

    Returns:
        Names of rank 0's kernels.
    """
    compute = run.config.compute
    batch = compute.micro_batch or run.config.loader.batch_size
    session.run_on_all_ranks(lambda: check_convolutions(compute.precision, device))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    shared = model.group is not None
    saved = run.checkpoint.kernels if run.checkpoint and device.type == "cuda" and not shared else []
    if shared and device.type == "cuda":
        logger.info("blocks of slabs: torch")

    def choose() -> list[str]:
        return choose_kernels(model, compute.kernels, compute.precision, batch, device)

    names, gpu_of_root = session.run_on_root(lambda: (saved or choose(), gpu))

    def use() -> None:
        own = names
        if gpu != gpu_of_root:
            own = choose()
            logger.warning(
                "kernels for %s, another GPU than rank 0's %s: %s", gpu, gpu_of_root, ", ".join(own)
            )
        use_kernels(model, own, compute.precision, batch)

    session.run_on_all_ranks(use)
    return names


def _exit_immediately(number: int, frame: FrameType | None) -> NoReturn:
    """Exit at a stop signal outside of training, where there is nothing to save."""
    os._exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    handle_stop_signals(_exit_immediately)
    exit_now(main(), World.detect())
