"""Who we are, from what each launcher says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, environment, mpirun, run

from pipelines.distributed.rendezvous import Meeting, meeting_place, open_store
from pipelines.distributed.session import World
from pipelines.errors import UserError

OMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_NTASKS": "11",
}
Place = dict[str, str]
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_alone_without_a_launcher() -> None:
    assert World.detect({}) == World(0, 1, 0, 1, "none")


def test_each_launcher() -> None:
    assert World.detect(OMPI) == World(5, 8, 1, 4, "mpirun")
    assert World.detect(SRUN) == World(9, 11, 1, 4, "srun")
    assert World.detect(TORCHRUN) == World(2, 3, 0, 1, "torchrun")


def test_a_batch_script_without_srun_is_alone() -> None:
    # sbatch gives its script SLURM_PROCID=0 and SLURM_NTASKS, though no step runs.
    assert World.detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}).size == 1


def test_mpirun_inside_a_slurm_step_counts() -> None:
    # A daemon on each node, of four ranks each.
    daemons = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert World.detect(SRUN | daemons | OMPI).launcher == "mpirun"


def test_other_mpis_count() -> None:
    hydra = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
    assert World.detect(hydra) == World(5, 8, 1, 4, "mpirun")
    # srun --mpi=pmi2 sets some of these beside its own.
    assert World.detect(SRUN | {"PMI_RANK": "9", "PMI_SIZE": "11"}).launcher == "srun"


def test_a_torchrun_on_each_task_of_srun_counts() -> None:
    inner = {"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
    outer = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert World.detect(inner | outer) == World(13, 16, 5, 8, "torchrun")


@pytest.mark.parametrize(
    ("stale", "outer"),
    [
        (TORCHRUN, OMPI),
        ({"RANK": "0", "WORLD_SIZE": "1"}, SRUN),
        ({"RANK": "0", "WORLD_SIZE": "16"}, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}),
    ],
)
def test_launchers_that_contradict_each_other_are_refused(stale: Place, outer: Place) -> None:
    with pytest.raises(UserError, match=f"RANK and WORLD_SIZE .* {next(iter(outer))} and .* stale"):
        World.detect(stale | outer)


def test_an_mpirun_that_is_smaller_than_the_step_around_it_is_refused() -> None:
    stale = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE .* SLURM_PROCID and .* 9 and 11: .* stale"):
        World.detect(stale | SRUN)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[07-09,12],login", "n07"), ("r[1-3]n[4,6]-ib", "r1n4-ib"), ("a,b[1-2]", "a")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    environ = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
    meeting = meeting_place("srun", environ, rank=0, size=2, one_node=False)
    assert meeting.address == first
    other = meeting_place("srun", environ | {"SLURM_STEP_ID": "2"}, rank=0, size=2, one_node=False)
    assert other.key != meeting.key and other.ports != meeting.ports


def test_where_srun_finds_rank_0_can_be_told() -> None:
    environ = {"SLURM_STEP_NODELIST": "n[1-2]", "MEETING_ADDRESS": "10.0.0.7", "MASTER_ADDR": "elsewhere"}
    assert meeting_place("srun", environ, rank=1, size=2, one_node=False).address == "10.0.0.7"


def test_models_meet_apart() -> None:
    def meet(launcher: str, environ: dict[str, str], model: int) -> Meeting:
        return meeting_place(launcher, environ, rank=0, size=3, one_node=True, model=model, models=2)

    store = open_store("127.0.0.1", 0, serves=True, seconds=10)
    agents = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    torchrun = agents | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "r"}
    for launcher, environ in (("torchrun", torchrun), ("mpirun", agents | {"PMIX_NAMESPACE": "job"})):
        first, second = (meet(launcher, environ, model) for model in range(2))
        assert first.key != second.key and first.ports != second.ports
    with pytest.raises(UserError, match="--instances = 2: is for mpirun and torchrun"):
        meet("torchrun", agents, 0)


def test_the_ranks_of_a_model_go_to_its_own_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def ask(launcher: str, environ: Place, **place: object) -> Meeting:
        asked.update(place)
        raise UserError("asked")

    monkeypatch.setattr("pipelines.distributed.session.meeting_place", ask)
    with pytest.raises(UserError, match="asked"), World(5, 6, 5, 6, "mpirun").split(2).connected():
        pass
    assert asked == {"rank": 2, "size": 3, "one_node": True, "model": 1, "models": 2}


def test_ranks_are_split_among_models() -> None:
    # Eight ranks on two nodes, into models of two nodes, of one, and of half a node.
    ranks = [World(rank, 8, rank % 4, 4, "mpirun") for rank in range(8)]
    assert [rank.split(1) for rank in ranks] == ranks
    halves = [rank.split(2) for rank in ranks]
    assert [(one.model, one.rank, one.size, one.local_rank, one.nodes) for one in halves] == [
        (rank // 4, rank % 4, 4, rank % 4, 1) for rank in range(8)
    ]
    pairs = [rank.split(4) for rank in ranks]
    assert [(one.model, one.rank, one.local_size) for one in pairs] == [(r // 2, r % 2, 2) for r in range(8)]
    # Each keeps its own GPU, and its share of the node's cores.
    assert [one.before + one.local_rank for one in pairs] == [0, 1, 2, 3] * 2
    assert {one.local_size + one.beside for one in pairs} == {4}
    for models in (3, 16, 0):
        with pytest.raises(UserError, match=f"--instances .*{models}"):
            ranks[0].split(models)
    with pytest.raises(UserError, match="do not fit nodes of 4"):
        World(0, 12, 0, 4, "mpirun").split(2)
    with pytest.raises(UserError, match="NUM_INSTANCES"):
        World(0, 8, 0, 4, "srun").split(2)


@pytest.mark.parametrize(("name", "value"), [("RANK", "3"), ("RANK", "-1"), ("WORLD_SIZE", "three")])
def test_variables_that_make_no_sense_are_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        World.detect(TORCHRUN | {name: value})


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert World().device("auto").type == "cpu"
    with pytest.raises(UserError, match="no GPU"):
        World().device("cuda")


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert World(1, 3, 1, 3).device("auto").index == 1
    with pytest.raises(UserError, match="3 ranks on this node but 2 GPUs"):
        World(2, 3, 2, 3).device("auto")


def test_a_rank_that_sees_one_gpu_has_it_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43")
    assert World(5, 8, 5, 8, "srun").device("cuda").index == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="8 ranks on this node but 1 GPUs"):
        World(5, 8, 5, 8, "srun").device("cuda")


def test_a_model_of_one_rank_works_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    with World(3, 8, 3, 8, "mpirun").split(8).connected(torch.device("cuda", 3)):
        assert chosen == [torch.device("cuda", 3)]


_MEET = """
import torch
from pipelines.distributed.session import World

world = World.detect()
with world.connected(torch.device("cpu")):
    print(world.launcher, world.sum(torch.tensor([10.0 ** world.rank])).item())
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
from pipelines.distributed.session import World

world = World.detect().split(2)
with world.connected():
    print("model", world.model, world.gather(world.rank))
"""
    done = run([*mpirun(6), sys.executable, "-c", program])
    assert done.code == 0, done.err
    assert [done.out.count(f"model {model} [0, 1, 2]") for model in range(2)] == [3, 3]


def test_models_on_several_nodes_have_places_of_their_own() -> None:
    program = """
import os
from pipelines.distributed.session import World
from pipelines.distributed.rendezvous import meeting_place

world = World.detect().split(2)
place = dict(rank=world.rank, size=world.size, model=world.model, models=world.models)
print(f"model {world.model} at", meeting_place("mpirun", os.environ, one_node=False, **place).key)
"""
    done = run([*mpirun(4), sys.executable, "-c", program])
    assert done.code == 0, done.err
    lines = sorted(done.out.splitlines())
    assert lines[0] == lines[1] and lines[2] == lines[3] and lines[0].split()[3] != lines[2].split()[3]


def test_a_fault_on_one_rank_ends_all_of_them() -> None:
    # Rank 1 fails while the others already wait for it in a collective.
    program = """
import torch
from pipelines.distributed.session import RankError, World
from pipelines.distributed.cli import report_errors
from pipelines.errors import UserError

world = World.detect()
with report_errors(world), world.connected(torch.device("cpu")):
    if world.rank == 1:
        raise RankError(world, UserError("the disk is on fire"))
    world.sum(torch.zeros(1))
"""
    done = run([*mpirun(3), sys.executable, "-c", program])
    assert done.code != 0
    assert done.err.count("rank 1 of 3: the disk is on fire") == 1
    assert "Traceback" not in done.err


def test_what_rank_0_has_to_say_is_heard_before_a_launcher_ends_it() -> None:
    program = """
import sys, time
from pipelines.distributed.session import World

world = World.detect()
with world.connected():
    pass
if world.is_root:
    time.sleep(4)
    print("the reason", file=sys.stderr)
world.exit_together(75)
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
from pipelines.distributed.session import World

world = World.detect()
with world.connected(torch.device("cpu")):
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
    world.exit_together(0)
"""
    done = run([*mpirun(2), sys.executable, "-c", program])
    assert done.code == 0, done.err
