"""Properties of an epoch's plan, and of its division among ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.plan import Indices, RankSlice, derive_seed, plan_epoch

SAMPLES, BATCH = st.integers(1, 300) | st.integers(1, 20_000), st.integers(1, 5)
RANKS = st.integers(1, 7) | st.integers(1, 4096) | st.just(4096)


def plan(samples: int, global_batch: int, *, epoch: int = 0, seed: int = 3, shuffle: bool = True) -> Indices:
    return plan_epoch(
        samples, global_batch=global_batch, seed=seed, epoch=epoch, shuffle=shuffle, ragged="pad"
    )


@given(SAMPLES, RANKS, BATCH, st.booleans())
def test_padded_plans_hold_every_sample_once_in_equal_steps_per_rank(
    samples: int, ranks: int, batch: int, shuffle: bool
) -> None:
    epoch = plan(samples, ranks * batch, shuffle=shuffle)
    shares = [RankSlice(rank, ranks).select(epoch) for rank in range(ranks)]
    assert {share.shape for share in shares} == {(-(-samples // (ranks * batch)), batch)}
    read = np.concatenate([share.ravel() for share in shares])
    assert sorted(read[read >= 0].tolist()) == list(range(samples))


@given(SAMPLES, RANKS, BATCH)
def test_dropped_plans_repeat_no_sample_and_omit_less_than_a_step(
    samples: int, ranks: int, batch: int
) -> None:
    each = ranks * batch
    if samples < each:
        with pytest.raises(UserError):
            plan_epoch(samples, global_batch=each, seed=0, epoch=0, shuffle=True, ragged="drop")
        return
    read = plan_epoch(samples, global_batch=each, seed=0, epoch=0, shuffle=True, ragged="drop").ravel()
    assert len(set(read.tolist())) == len(read) > samples - each
    assert set(read.tolist()) <= set(range(samples))


@given(SAMPLES, st.sampled_from([1, 2, 3, 4, 6, 4096]), st.integers(0, 5))
def test_all_ranks_together_read_the_same_plan(samples: int, ranks: int, epoch: int) -> None:
    epoch_plan = plan(samples, max(12, ranks), epoch=epoch)
    shares = [RankSlice(rank, ranks).select(epoch_plan) for rank in range(ranks)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), epoch_plan)


def test_padding_is_at_the_end_of_the_last_step() -> None:
    epoch = plan(10, 4)
    assert (epoch[:-1] >= 0).all()
    assert (epoch[-1] >= 0).tolist() == [True, True, False, False]


def test_without_shuffling_the_order_is_file_order() -> None:
    assert plan(8, 4, shuffle=False, epoch=5).ravel().tolist() == list(range(8))


def test_each_epoch_and_each_seed_has_a_different_order() -> None:
    orders = {tuple(plan(64, 4, epoch=e, seed=s).ravel().tolist()) for e in range(5) for s in range(5)}
    assert len(orders) == 25
    assert tuple(range(64)) not in orders


def test_shuffling_is_uniform() -> None:
    # Positions of sample 0 over many epochs, by a chi-squared test.
    positions = [int(np.flatnonzero(plan(8, 1, epoch=epoch).ravel() == 0)[0]) for epoch in range(2000)]
    observed = np.bincount(positions, minlength=8)
    chi_square = float(((observed - 250.0) ** 2 / 250.0).sum())
    assert chi_square < 24.3  # the 99.9% point for 7 degrees of freedom


def test_the_order_never_changes_between_versions() -> None:
    # Fixed values: checkpoints must resume in later versions.
    assert plan(6, 6, seed=1, epoch=2).ravel().tolist() == [2, 3, 1, 0, 5, 4]
    assert derive_seed(1, "shuffle", 2) == 1461623359150554792


def test_seeds_of_different_streams_differ() -> None:
    words = [("step", 1, 11), ("step", 11, 1), ("step", 111), ("symmetry", 1, 11)]
    seeds = {derive_seed(0, *word) for word in words}
    assert len(seeds) == len(words)
    assert all(0 <= seed < 2**63 for seed in seeds)
