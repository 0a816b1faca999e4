"""Learning rates of both schedules."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from cosmoflow_dali.compute.schedule import OneCycleConfig, StepDecayConfig, lr_at

STEPS = 10


def by_epoch(config: StepDecayConfig, epoch: int, step: int = 0) -> float:
    return lr_at(config, step=epoch * STEPS + step, steps_per_epoch=STEPS, epochs=100)


def test_warm_up_rises_by_epochs_and_decay_starts_at_its_epoch() -> None:
    # NVIDIA v1.0, 16 nodes: 0.001 to 0.004 over 4 epochs, a quarter from 16 on, an eighth from 32 on.
    config = StepDecayConfig(
        initial_lr=0.001, base_lr=0.004, warmup_epochs=4, decay_epochs=(16, 32), decay_factors=(0.25, 0.125)
    )
    expected = {0: 0.001, 1: 0.00175, 2: 0.0025, 3: 0.00325, 4: 0.004, 15: 0.004, 16: 0.001, 31: 0.001}
    expected |= {32: 0.0005, 99: 0.0005}
    for epoch, lr in expected.items():
        assert by_epoch(config, epoch) == pytest.approx(lr, rel=1e-12)
        assert by_epoch(config, epoch, STEPS - 1) == by_epoch(config, epoch)


def test_without_warm_up_the_first_rate_is_the_base_rate() -> None:
    assert by_epoch(StepDecayConfig(warmup_epochs=0), 0) == 0.008


def test_one_cycle_rises_linearly_and_falls_as_a_cosine() -> None:
    config = OneCycleConfig(peak_lr=0.01, warmup_fraction=0.1)
    rates = [lr_at(config, step=step, steps_per_epoch=100, epochs=10) for step in range(1000)]
    assert max(rates) == pytest.approx(0.01)
    assert 95 <= rates.index(max(rates)) <= 100
    rise = [after - before for before, after in pairwise(rates[:96])]
    assert max(rise) == pytest.approx(min(rise), rel=1e-6)
    # Half the rate half-way down the cosine; at the end almost 0, but above it.
    assert rates[550] == pytest.approx(0.005, rel=0.01)
    assert rates[775] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 0.75)), rel=0.01)
    assert 0 < rates[-1] < 1e-6
    assert all(rate > 0 for rate in rates)
