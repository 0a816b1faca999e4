"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepDecayConfig:
    """The reference's rule: warm-up by whole epochs, then factors of the base rate.

    In epoch e (from 0) before `warmup_epochs` the rate is initial_lr + e (base_lr - initial_lr) /
    warmup_epochs; from then on it is base_lr times the factor of the last boundary passed. A
    boundary holds from its epoch on.
    """

    kind: Literal["step_decay"] = "step_decay"
    initial_lr: float = 0.001
    base_lr: float = 0.008
    warmup_epochs: int = 4
    decay_epochs: tuple[int, ...] = (32, 64)
    decay_factors: tuple[float, ...] = (0.25, 0.125)

    def __post_init__(self) -> None:
        if self.initial_lr < 0:
            raise ConfigError("schedule.initial_lr", self.initial_lr, "must be at least 0")
        if self.base_lr < self.initial_lr:
            raise ConfigError(
                "schedule.base_lr",
                self.base_lr,
                f"must be at least schedule.initial_lr = {self.initial_lr}",
            )
        if self.warmup_epochs < 0:
            raise ConfigError("schedule.warmup_epochs", self.warmup_epochs, "must be at least 0")
        epochs = self.decay_epochs
        if list(epochs) != sorted(set(epochs)) or any(epoch < 0 for epoch in epochs):
            raise ConfigError("schedule.decay_epochs", epochs, "must rise from at least 0")
        if len(self.decay_factors) != len(epochs):
            raise ConfigError(
                "schedule.decay_factors",
                self.decay_factors,
                f"must be as many as decay_epochs = {epochs}",
            )
        if not all(0 < factor < 1 for factor in self.decay_factors):
            raise ConfigError("schedule.decay_factors", self.decay_factors, "must each be between 0 and 1")


@dataclass(frozen=True, slots=True)
class OneCycleConfig:
    """Linear from 0 to `peak_lr` over the first `warmup_fraction` of all steps, then a cosine to 0."""

    kind: Literal["one_cycle"] = "one_cycle"
    peak_lr: float = 0.01
    warmup_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.peak_lr <= 0:
            raise ConfigError("schedule.peak_lr", self.peak_lr, "must be above 0")
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(
                "schedule.warmup_fraction", self.warmup_fraction, "must be at least 0 and below 1"
            )


def lr_at(config: StepDecayConfig | OneCycleConfig, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of `step`, counted from 0, in a run of `epochs` epochs."""
    if isinstance(config, OneCycleConfig):
        total = steps_per_epoch * epochs
        warmup = config.warmup_fraction * total
        # A step's rate is that of its middle, so that neither the first nor the last is lost on a rate of 0.
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
