"""Sessions of ranks that real launchers start, and collectives, errors and exits in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, environment, mpirun, run

from pipelines.distributed.cli import report_errors
from pipelines.distributed.world import World


def test_a_model_of_one_rank_works_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    with report_errors(World(3, 8, 3, 8, "mpirun").partition_ranks(8)) as session:
        session.connect(torch.device("cuda", 3))
        assert chosen == [torch.device("cuda", 3)]


_MEET = """
import torch
from pipelines.distributed.world import World

world = World.detect()
with report_errors(world) as session:
    session.connect(torch.device("cpu"))
    print(world.launcher, session.sum(torch.tensor([10.0 ** world.rank])).item())
"""


def test_ranks_that_srun_starts_meet() -> None:
    # What srun sets stands in for a cluster.
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node[1]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _MEET],
            cwd=ROOT,
            env=environment() | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert said == ["srun 11.0\n", "srun 11.0\n"]


def test_ranks_that_torchrun_starts_meet(tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(_MEET)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "meet.py")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Three processes write to one pipe, and their words may run together.
    assert done.stdout.count("torchrun") == done.stdout.count("111.0") == 3


def test_ranks_that_mpirun_starts_meet() -> None:
    done = run([*mpirun(3), sys.executable, "-c", _MEET])
    assert done.code == 0, done.err
    assert done.out.count("mpirun") == done.out.count("111.0") == 3


@pytest.mark.slow
def test_the_ranks_of_two_models_meet_their_own() -> None:
    program = """
from pipelines.distributed.world import World

world = World.detect().partition_ranks(2)
with report_errors(world) as session:
    session.connect()
    print("model", world.instance, session.gather(world.rank))
"""
    done = run([*mpirun(6), sys.executable, "-c", program])
    assert done.code == 0, done.err
    assert [done.out.count(f"model {model} [0, 1, 2]") for model in range(2)] == [3, 3]


def test_models_on_several_nodes_have_places_of_their_own() -> None:
    program = """
import os
from pipelines.distributed.world import World
from pipelines.distributed.rendezvous import find_endpoint

world = World.detect().partition_ranks(2)
environ = {name: value for name, value in os.environ.items() if name != "PMIX_NAMESPACE"}
print(f"model {world.instance} at", find_endpoint(world, environ).key)
"""
    done = run([*mpirun(4), sys.executable, "-c", program])
    assert done.code == 0, done.err
    lines = sorted(done.out.splitlines())
    assert lines[0] == lines[1] and lines[2] == lines[3] and lines[0].split()[3] != lines[2].split()[3]


def test_a_fault_on_one_rank_ends_all_of_them() -> None:
    # Rank 1 fails while the others already wait for it in a collective.
    program = """
import torch
from pipelines.distributed.session import RankError
from pipelines.distributed.world import World
from pipelines.distributed.cli import report_errors
from pipelines.errors import UserError

world = World.detect()
with report_errors(world) as session:
    session.connect(torch.device("cpu"))
    if world.rank == 1:
        raise RankError(world, UserError("the disk is on fire"))
    session.sum(torch.zeros(1))
"""
    done = run([*mpirun(3), sys.executable, "-c", program])
    assert done.code != 0
    assert done.err.count("rank 1 of 3: the disk is on fire") == 1
    assert "Traceback" not in done.err


def test_what_rank_0_has_to_say_is_heard_before_a_launcher_ends_it() -> None:
    program = """
import sys, time
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World

world = World.detect()
with report_errors(world) as session:
    session.connect()
    if world.is_root:
        time.sleep(4)
        print("the reason", file=sys.stderr)
exit_now(75, world)
"""
    done = run([*mpirun(3), sys.executable, "-c", program])
    assert done.code == 75 and "the reason" in done.err


def test_a_collective_that_ends_late_does_not_abort_a_rank_that_leaves() -> None:
    # Rank 0 is late, so that rank 1's gloo lets go of its tensors while rank 1 is on its way out.
    program = """
import atexit, ctypes, time
# The last thing before an interpreter tidies up, if it does: two seconds without a turn for other threads.
atexit.register(ctypes.PyDLL(None).sleep, 2)
import torch
import torch.distributed as dist
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World

world = World.detect()
with report_errors(world) as session:
    session.connect(torch.device("cpu"))
    dist.barrier()
    if world.rank == 0:
        time.sleep(0.5)
    mine, parts = torch.ones(1), [torch.zeros(1) for _ in range(2)]
    for tensor in (mine, *parts):
        # Gives the storage an object of Python's, as gathering objects does.
        tensor.untyped_storage()
    dist.all_gather(parts, mine, async_op=True)
    del mine, parts, tensor
    if world.rank == 0:
        time.sleep(3)
    exit_now(0, world)
"""
    done = run([*mpirun(2), sys.executable, "-c", program])
    assert done.code == 0, done.err
