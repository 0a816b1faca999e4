"""Groups of consecutive ranks."""

from __future__ import annotations

import sys

from helpers import Ranks
from rank_programs import HEAD

PROGRAM = (
    HEAD
    + """
import numpy as np
from pipelines.distributed.sample_groups import consecutive_ranks, maximum_over
with report_errors(world) as session:
    session.connect()
"""
)


def run(program: str, ranks: int, **variables: str) -> tuple[set[int], str]:
    with Ranks([sys.executable, "-c", PROGRAM + program], range(ranks), ranks, **variables) as started:
        return started.end(60)


def test_ranks_are_divided_into_groups_that_wait_as_long_as_all() -> None:
    program = """
    assert consecutive_ranks(1) is None
    group = consecutive_ranks(2)
    assert dist.get_process_group_ranks(group) == [world.rank // 2 * 2, world.rank // 2 * 2 + 1]
    timeouts = {each._get_backend(torch.device("cpu")).options._timeout for each in (group, dist.group.WORLD)}
    assert len(timeouts) == 1
    found = maximum_over(session, 2)(np.array([world.rank, -world.rank]))
    assert found.tolist() == [world.rank // 2 * 2 + 1, -(world.rank // 2 * 2)]
"""
    assert run(program, 4) == ({0}, "")


def test_rank_that_waits_for_a_slow_one_is_not_reported_as_stuck() -> None:
    program = """
    maximum = maximum_over(session, 2)
    with session.stall_guard("reading"):
        if world.rank == 1:
            with session.stall_guard(None):
                time.sleep(3)
        maximum(np.array([0]))
    with session.stall_guard("reading"):
        maximum(np.array([0]))
        time.sleep(10 * world.rank)
    maximum(np.array([0]))
"""
    statuses, words = run(program, 2, HEARTBEAT_INTERVAL="1", STALL_TIMEOUT="1")
    assert statuses == {1}
    assert words.startswith("error: rank 1 (") and "stuck" in words and "rank 0 (" not in words
