"""The events that the MLPerf HPC rules require in a run's log.

The keys are those of mlperf_logging.mllog.constants; mlperf_logging.compliance_checker (usage hpc, ruleset
3.0.0) checks them.
"""

from __future__ import annotations

from typing import Any

from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from cosmoflow_dali.compute.optim import SGDConfig
from cosmoflow_dali.compute.schedule import StepDecayConfig
from cosmoflow_dali.config import TrainConfig
from cosmoflow_dali.models.reference import ReferenceConfig
from pipelines.distributed.world import World


def log_settings(
    log: MLLogger, config: TrainConfig, world: World, *, seed: int, samples: tuple[int, int]
) -> None:
    """Log submitter, system and hyperparameters of a run on `samples` = (training, validation) samples."""
    submission = config.submission
    events: dict[str, Any] = {
        constants.SUBMISSION_BENCHMARK: "cosmoflow",
        constants.SUBMISSION_ORG: submission.org,
        constants.SUBMISSION_DIVISION: submission.division,
        constants.SUBMISSION_STATUS: submission.status,
        constants.SUBMISSION_PLATFORM: submission.platform,
        "number_of_nodes": world.nodes,
        "accelerators_per_node": world.local_size,
        constants.SEED: seed,
        constants.GLOBAL_BATCH_SIZE: config.samples_per_step(world.size),
        constants.TRAIN_SAMPLES: samples[0],
        constants.EVAL_SAMPLES: samples[1],
        constants.OPT_NAME: config.optimizer.kind,
    }
    if isinstance(config.model, ReferenceConfig):
        events["dropout"] = config.model.dropout
    if isinstance(config.optimizer, SGDConfig):
        events[constants.OPT_WEIGHT_DECAY] = config.optimizer.weight_decay
    if isinstance(config.schedule, StepDecayConfig):
        schedule = config.schedule
        factor = schedule.base_lr / schedule.initial_lr if schedule.initial_lr else 0.0
        events |= {
            constants.OPT_BASE_LR: schedule.base_lr,
            constants.OPT_LR_WARMUP_EPOCHS: schedule.warmup_epochs,
            constants.OPT_LR_WARMUP_FACTOR: factor,
            constants.OPT_LR_DECAY_BOUNDARY_EPOCHS: list(schedule.decay_epochs),
            constants.OPT_LR_DECAY_FACTOR: list(schedule.decay_factors),
        }
    else:
        events[constants.OPT_BASE_LR] = config.schedule.peak_lr
    for key, value in events.items():
        log.event(key, value=value)
