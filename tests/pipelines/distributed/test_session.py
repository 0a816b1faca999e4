"""Sessions: connecting, collectives, errors and exits."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from helpers import Ranks
from rank_programs import CONNECT, HEAD

from pipelines.distributed.cli import report_errors
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.errors import UserError


def forked(program: str, ranks: int) -> Ranks:
    return Ranks([sys.executable, "-c", HEAD + program], range(ranks), ranks, HEARTBEAT_INTERVAL="1")


def test_collectives_of_one_rank_are_plain_calls() -> None:
    session = Session(World())
    assert session.run_on_root(lambda: 1) == session.run_on_all_ranks(lambda: 1) == 1
    assert session.scatter(lambda: ["a"]) == "a"
    assert session.gather(2) == session.gather_to_root(2) == [2]
    with session.stall_guard("nothing"):
        assert list(session.with_stall_guard([3, 4], "nothing")) == [3, 4]


def test_collectives_of_three_ranks() -> None:
    program = """
with report_errors(world) as session:
    session.connect()
    assert session.run_on_root(lambda: world.rank) == 0
    assert session.run_on_all_ranks(lambda: world.rank) == world.rank
    assert session.scatter(lambda: ["a", "b", "c"]) == "abc"[world.rank]
    assert session.gather(world.rank) == [0, 1, 2]
    assert session.gather_to_root(world.rank) == ([0, 1, 2] if world.is_root else [])
    assert session.sum(torch.ones(2)).tolist() == [3, 3]
    def fail():
        if world.rank > 0:
            raise UserError(f"error of rank {world.rank}")
    def fail_on_root():
        raise UserError("error of rank 0")
    for run, function in ((session.run_on_all_ranks, fail), (session.run_on_root, fail_on_root)):
        try:
            run(function)
        except UserError as error:
            print(error)
"""
    with forked(program, 3) as ranks:
        statuses, words = ranks.end(60)
    assert statuses == {0} and words == "error of rank 1\nerror of rank 0\n" * 3


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_gloo_uses_the_interface_that_reaches_rank_0_and_not_the_hosts_name(kind: str) -> None:
    program = """
import os
# The interface is chosen without a GPU.
connect, torch.cuda.set_device = dist.init_process_group, print
dist.init_process_group = lambda backend, device_id, **options: connect("gloo", **options)
with report_errors(world) as session:
    session.connect(torch.device(sys.argv[1]))
    assert session.gather(os.environ["GLOO_SOCKET_IFNAME"]) == ["lo"] * 3
"""
    nodes = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "HEARTBEAT_INTERVAL": "1"}
    with Ranks([sys.executable, "-c", HEAD + program, kind], range(3), 3, **nodes) as ranks:
        statuses, _ = ranks.end(60)
    assert statuses == {0}


def test_instance_of_one_rank_uses_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    with report_errors(World(3, 8, 3, 8, "mpirun").partition_ranks(8)) as session:
        session.connect(torch.device("cuda", 3))
    assert chosen == [torch.device("cuda", 3)]


def test_instances_connect_to_their_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[World] = []

    def find(world: World, environ: object) -> None:
        asked.append(world)
        raise UserError("asked")

    monkeypatch.setattr("pipelines.distributed.session.find_endpoint", find)
    with pytest.raises(UserError):
        Session(World(5, 6, 5, 6, "mpirun").partition_ranks(2)).connect()
    assert [(world.instance, world.rank, world.size) for world in asked] == [(1, 2, 3)]


def test_ranks_exit_after_rank_0_has_finished() -> None:
    program = """
with report_errors(world) as session:
    session.connect()
    if world.is_root:
        time.sleep(2)
        print("the reason", file=sys.stderr)
exit_now(75, world)
"""
    with forked(program, 3) as ranks:
        statuses, words = ranks.end(60)
    assert statuses == {75} and words == "the reason\n"


def test_collective_that_ends_late_does_not_abort_an_exiting_rank() -> None:
    # Rank 0 is late, so that rank 1's gloo releases its tensors while rank 1 exits.
    program = """
import atexit, ctypes
# The last thing before an interpreter shuts down, if it does: two seconds without the GIL for other threads.
atexit.register(ctypes.PyDLL(None).sleep, 2)
with report_errors(world) as session:
    session.connect(torch.device("cpu"))
    dist.barrier()
    if world.rank == 0:
        time.sleep(0.5)
    mine, parts = torch.ones(1), [torch.zeros(1) for _ in range(2)]
    for tensor in (mine, *parts):
        # Gives the storage a Python object, as gathering objects does.
        tensor.untyped_storage()
    dist.all_gather(parts, mine, async_op=True)
    del mine, parts, tensor
    if world.rank == 0:
        time.sleep(3)
    exit_now(0, world)
"""
    with forked(program, 2) as ranks:
        statuses, words = ranks.end(60)
    assert statuses == {0}, words


def test_srun_variables_connect_ranks() -> None:
    # What srun sets stands in for a cluster.
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node[1]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
    }
    with (
        Ranks(
            [sys.executable, "-c", CONNECT], [0], 1, **shared, SLURM_PROCID="0", SLURM_LOCALID="0"
        ) as first,
        Ranks(
            [sys.executable, "-c", CONNECT], [1], 1, **shared, SLURM_PROCID="1", SLURM_LOCALID="1"
        ) as second,
    ):
        assert [rank.end(60) for rank in (first, second)] == [({0}, "srun 11.0\n")] * 2
