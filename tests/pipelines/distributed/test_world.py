"""Rank arithmetic, and the variables of each launcher that it comes from."""

from __future__ import annotations

import pytest

from pipelines.distributed.world import World
from pipelines.errors import ConfigError

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
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_each_launcher_is_detected() -> None:
    assert World.detect({}) == World(0, 1, 0, 1, "none")
    assert World.detect(OMPI) == World(5, 8, 1, 4, "mpirun")
    assert World.detect(SRUN) == World(9, 11, 1, 4, "srun")
    assert World.detect(TORCHRUN) == World(2, 3, 0, 1, "torchrun")
    hydra = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
    assert World.detect(hydra) == World(5, 8, 1, 4, "mpirun")
    # srun --mpi=pmi2 sets some of these beside its own.
    assert World.detect(SRUN | {"PMI_RANK": "9", "PMI_SIZE": "11"}).launcher == "srun"


def test_batch_script_without_srun_is_one_rank() -> None:
    # sbatch gives its script SLURM_PROCID=0 and SLURM_NTASKS, though no step runs.
    assert World.detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}).size == 1


def test_launcher_inside_a_slurm_step_takes_precedence() -> None:
    # An mpirun with one daemon on each node, which starts four ranks.
    daemons = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert World.detect(SRUN | daemons | OMPI).launcher == "mpirun"
    inner = {"RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
    outer = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert World.detect(inner | outer) == World(13, 16, 5, 8, "torchrun")


def test_contradicting_launchers_are_refused() -> None:
    for stale, outer in (
        (TORCHRUN, OMPI),
        ({"RANK": "0", "WORLD_SIZE": "1"}, SRUN),
        ({"RANK": "0", "WORLD_SIZE": "16"}, {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}),
    ):
        with pytest.raises(ConfigError) as refused:
            World.detect(stale | outer)
        assert refused.value.key == "RANK and WORLD_SIZE" and next(iter(outer)) in refused.value.remedy
    # An mpirun that is smaller than the step around it.
    with pytest.raises(ConfigError, match=r"SLURM_PROCID and .* 9 and 11: unset the stale ones"):
        World.detect({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"} | SRUN)


def test_invalid_variables_are_named() -> None:
    for name, value in (("RANK", "3"), ("RANK", "-1"), ("WORLD_SIZE", "three")):
        with pytest.raises(ConfigError) as refused:
            World.detect(TORCHRUN | {name: value})
        assert refused.value.key == name


def test_ranks_are_partitioned_among_instances() -> None:
    # Eight ranks on two nodes, into instances of two nodes, of one, and of half a node.
    ranks = [World(rank, 8, rank % 4, 4, "mpirun") for rank in range(8)]
    assert [rank.partition_ranks(1) for rank in ranks] == ranks
    halves = [rank.partition_ranks(2) for rank in ranks]
    assert [(one.instance, one.rank, one.size, one.local_rank, one.nodes) for one in halves] == [
        (rank // 4, rank % 4, 4, rank % 4, 1) for rank in range(8)
    ]
    pairs = [rank.partition_ranks(4) for rank in ranks]
    assert [(one.instance, one.rank, one.local_size) for one in pairs] == [
        (rank // 2, rank % 2, 2) for rank in range(8)
    ]
    # Each keeps its own GPU, and its share of the node's cores.
    assert [one.local_rank_offset + one.local_rank for one in pairs] == [0, 1, 2, 3] * 2
    assert {one.local_size + one.other_local_ranks for one in pairs} == {4}


def test_impossible_partitions_are_refused() -> None:
    for world, instances in (
        *((World(0, 8, 0, 4, "mpirun"), instances) for instances in (3, 16, 0)),
        (World(0, 12, 0, 4, "mpirun"), 2),
        (World(0, 8, 0, 4, "srun"), 2),
    ):
        with pytest.raises(ConfigError) as refused:
            world.partition_ranks(instances)
        assert (refused.value.key, refused.value.value) == ("--instances", instances)


def test_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert World().device("auto").type == "cpu"
    with pytest.raises(ConfigError):
        World().device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert World(1, 3, 1, 3).device("auto").index == 1
    with pytest.raises(ConfigError, match="3 ranks on this node but 2 GPUs"):
        World(2, 3, 2, 3).device("auto")
    # A rank that sees one GPU by CUDA_VISIBLE_DEVICES has it for itself.
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43")
    assert World(5, 8, 5, 8, "srun").device("cuda").index == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError):
        World(5, 8, 5, 8, "srun").device("cuda")
