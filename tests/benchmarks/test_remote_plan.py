"""The requests of an epoch from an object store: coverage, joined requests, loads and costs."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import remote_plan
from benchmarks.remote_cost import FORMATS, fetched, hit_rate, in_flight
from benchmarks.remote_plan import SHARD, check_plan, count_joined, loads
from pipelines.errors import UserError
from pipelines.plan import Indices, Ragged, RankSlice, plan_epoch


def _plan(
    samples: int, batch: int, ragged: Ragged = "pad", *, epoch: int = 0, shuffle: bool = True
) -> Indices:
    return plan_epoch(samples, global_batch=batch, seed=1, epoch=epoch, shuffle=shuffle, ragged=ragged)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_every_sample_is_asked_for_once(ranks: int) -> None:
    for shuffle in (True, False):
        assert check_plan(_plan(1000, 2 * ranks, shuffle=shuffle), ranks, 1000, "pad") == 1000
        dropped = _plan(1000, 2 * ranks, "drop", shuffle=shuffle)
        assert check_plan(dropped, ranks, 1000, "drop") == 1000 - 1000 % (2 * ranks)


def test_a_plan_that_repeats_or_loses_a_sample_is_refused() -> None:
    for index in (7, -1):
        plan = _plan(1000, 8, shuffle=False)
        plan[100, 3] = index
        with pytest.raises(ValueError, match="ask"):
            check_plan(plan, 8, 1000, "pad")


def test_joined_requests_are_neighbours_in_the_order_of_a_rank() -> None:
    plan = _plan(3 * SHARD, 16)
    plan[0, :4], plan[1, :2] = (5, 6, 7, 9), (SHARD - 1, SHARD)
    plan[2, 6:8], plan[3, :2] = (20, 21), (22, 23)
    plan[4, 7:9] = 30, 31
    expected = 0
    for rank in range(2):
        order = RankSlice(rank, 2).select(plan).ravel().tolist()
        expected += sum(b == a + 1 and b % SHARD > 0 for a, b in pairwise(order))
    # A run of three and one of four over the end of a step; not over the end of a shard, or between ranks.
    assert count_joined(plan, 2) == expected >= 5
    # In file order a rank's batch of eight takes two requests, and a shard in one piece sixteen.
    assert count_joined(_plan(3 * SHARD, 16, shuffle=False), 2) == 3 * SHARD * 6 // 8
    assert count_joined(_plan(4 * SHARD, 1, shuffle=False), 1) == 4 * (SHARD - 16)


def test_loads_are_those_of_full_seconds() -> None:
    # Ten samples a step, 2.5 steps a second: 30 samples, then 20, then 30; the rest fill no second.
    found = loads([_plan(90, 10, shuffle=False)], 0.4, 2)
    assert [load.tolist() for load in found] == [[30, 0], [20, 0], [14, 16]]


def test_caches_hit_as_the_formula_says() -> None:
    samples, nodes, held = 16384, 4, 0.5
    room, caches = int(held * samples), np.zeros((nodes, samples), dtype=bool)
    misses = 0
    for epoch in range(5):
        plan, hits = _plan(samples, 64, epoch=epoch), 0
        for node, cache in enumerate(caches):
            order = RankSlice(node, nodes).select(plan).ravel()
            hits += int(cache[order].sum())
            missed = order[~cache[order]]
            cache[missed[: room - int(cache.sum())]] = True
        assert hits / samples == pytest.approx(hit_rate(nodes, held, epoch), abs=0.01)
        misses += samples - hits
    assert misses / samples == pytest.approx(fetched(nodes, held, 5), abs=0.02)
    assert fetched(1, 1.0, 23) == 1.0


def test_requests_in_flight_follow_littles_law() -> None:
    # An answer takes 100 ms and 1.87 MB at 85 MB/s, and an npy sample needs two.
    packed, npy, _ = FORMATS
    assert in_flight(200, 0.1, packed) == pytest.approx(200 * (0.1 + 0.022))
    assert in_flight(200, 0.1, npy) == pytest.approx(200 * (0.2 + 0.1974), rel=1e-3)


def test_the_program_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ranks", "4,7", "--samples", "1000", "--rate", "5000", "--output", str(tmp_path)]
    results = remote_plan.main(options)
    first, *_, last = results["loads"]
    assert (first["ranks"], first["asked"], first["left"], first["rate"]) == (4, 1000, 0, 20_000)
    assert (last["shuffle"], last["left"], last["ranges"]) == (False, 1000 % 7, math.ceil(35_000 / 5_500))
    # An epoch takes less than a second: 20 of them hold 20,000 requests.
    assert first["shard_mean"] == pytest.approx(20_000 / 16)
    assert results["costs"]["npy"]["requests"] == 2000
    assert "7 ranks: S3 must" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"] == results
    with pytest.raises(UserError):
        remote_plan.main(["--ranks", "1001", "--samples", "1000"])
