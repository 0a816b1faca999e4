"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import check_field, yaml_text


@dataclass(frozen=True, slots=True)
class StepDecayConfig:
    """Schedule of the MLPerf reference: warm-up by whole epochs, then factors of the base rate.

    In epoch e (from 0) before `warmup_epochs` the rate is initial_lr + e (base_lr - initial_lr) /
    warmup_epochs; afterwards it is base_lr times the factor of the last decay epoch reached.

    Args:
        kind: Selects this schedule.
        initial_lr: Learning rate at the start of warm-up, at least 0.
        base_lr: Learning rate after warm-up, at least `initial_lr`.
        warmup_epochs: Epochs from `initial_lr` to `base_lr`.
        decay_epochs: Epochs, counted from 0, at which the factors take effect, in rising order.
        decay_factors: Factor of `base_lr` from each decay epoch on, between 0 and 1.
    """

    kind: Literal["step_decay"] = "step_decay"
    initial_lr: float = 0.001
    base_lr: float = 0.008
    warmup_epochs: int = 4
    decay_epochs: tuple[int, ...] = (32, 64)
    decay_factors: tuple[float, ...] = (0.25, 0.125)

    def __post_init__(self) -> None:
        epochs, factors = self.decay_epochs, self.decay_factors
        rising = list(epochs) == sorted(set(epochs)) and all(epoch >= 0 for epoch in epochs)
        check_field(self, "initial_lr", self.initial_lr >= 0, "must be at least 0")
        remedy = f"must be at least initial_lr = {self.initial_lr}"
        check_field(self, "base_lr", self.base_lr >= self.initial_lr, remedy)
        check_field(self, "warmup_epochs", self.warmup_epochs >= 0, "must be at least 0")
        check_field(self, "decay_epochs", rising, "must rise from at least 0")
        remedy = f"must be as many as decay_epochs = {yaml_text(epochs)}, each between 0 and 1"
        valid = len(factors) == len(epochs) and all(0 < factor < 1 for factor in factors)
        check_field(self, "decay_factors", valid, remedy)


@dataclass(frozen=True, slots=True)
class OneCycleConfig:
    """Linear warm-up from 0 to `peak_lr`, then a cosine to 0.

    Args:
        kind: Selects this schedule.
        peak_lr: Highest learning rate, above 0.
        warmup_fraction: Fraction of all steps spent on warm-up, at least 0 and below 1.
    """

    kind: Literal["one_cycle"] = "one_cycle"
    peak_lr: float = 0.01
    warmup_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_field(self, "peak_lr", self.peak_lr > 0, "must be above 0")
        check_field(self, "warmup_fraction", 0 <= self.warmup_fraction < 1, "must be at least 0 and below 1")


def lr_at(config: StepDecayConfig | OneCycleConfig, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of `step`, counted from 0, in a run of `epochs` epochs."""
    if isinstance(config, OneCycleConfig):
        total = steps_per_epoch * epochs
        warmup = config.warmup_fraction * total
        # The rate at the middle of the step, so that neither the first nor the last step has a rate of 0.
        at = step + 0.5
        if at < warmup:
            return config.peak_lr * at / warmup
        return config.peak_lr * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (total - warmup)))
    epoch = step // steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.initial_lr + epoch * (config.base_lr - config.initial_lr) / config.warmup_epochs
    factor = 1.0
    for boundary, decay in zip(config.decay_epochs, config.decay_factors, strict=True):
        if epoch >= boundary:
            factor = decay
    return config.base_lr * factor
