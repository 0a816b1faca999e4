"""Rank arithmetic: instances, nodes and devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.distributed import world as module
from pipelines.distributed.world import World, available_cores, available_memory
from pipelines.errors import ConfigError


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


def test_nodes_of_ranks_out_of_order_are_refused() -> None:
    assert [World(rank, 8, rank % 4, 4).node for rank in (0, 3, 4, 7)] == [0, 0, 1, 1]
    # srun --distribution=cyclic, a plane of 2, and nodes with 4, 4 and 3 ranks.
    for world in (World(1, 8, 0, 4), World(2, 8, 0, 4), World(9, 11, 1, 3)):
        with pytest.raises(ConfigError) as refused:
            _ = world.node
        assert (refused.value.key, refused.value.value) == ("rank", world.rank)


def test_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert World().device("auto").type == "cpu"
    with pytest.raises(ConfigError):
        World().device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert World(1, 2, 1, 2).device("auto").index == 1
    # Also on rank 0, which prints the error.
    for rank in range(3):
        with pytest.raises(ConfigError, match="3 ranks on this node but 2 GPUs"):
            World(rank, 3, rank, 3).device("auto")
    # A rank that sees one GPU by CUDA_VISIBLE_DEVICES has it for itself.
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5ebe9f43")
    assert World(5, 8, 5, 8, "srun").device("cuda").index == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError):
        World(5, 8, 5, 8, "srun").device("cuda")


def write_groups(own: str, files: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `files` by path be those of the control groups, `own` of which are those of this process."""
    groups = folder / "groups"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text + "\n")
    (folder / "own").write_text(own)
    monkeypatch.setattr(module, "_CGROUPS", groups)
    monkeypatch.setattr(module, "_OWN_CGROUPS", folder / "own")


@pytest.mark.parametrize(
    ("own", "files", "megabytes"),
    [
        ("0::/\n", {"memory.max": "3000000"}, 3),
        ("0::/\n", {"memory.max": "5000000", "memory.stat": "anon 2000000\nfile 900000"}, 3),
        ("0::/\n", {"memory.max": "5000000", "memory.stat": "anon 6000000\nfile 900000"}, 0),
        ("0::/\n", {"memory.max": "max"}, 8),
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/memory.max": "2000000", "slurm/memory.max": "max"}, 2),
        ("4:memory:/docker/3f\n", {"memory/memory.limit_in_bytes": "1000000"}, 1),
        (
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": "3000000", "memory/memory.stat": "rss 7\ntotal_rss 2000000"},
            1,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8),
        ("4:cpu:/\n", {"memory/memory.limit_in_bytes": "1000000"}, 8),
        ("", {}, 8),
    ],
)
def test_memory_is_what_is_free_and_no_more_than_the_limit_of_a_container(
    own: str, files: dict[str, str], megabytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_groups(own, files, tmp_path, monkeypatch)
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemFree: 1 kB\nMemAvailable:    7812 kB\n")
    monkeypatch.setattr(module, "_MEMINFO", tmp_path / "meminfo")
    assert available_memory() == pytest.approx(megabytes * 1e6, rel=1e-3)
    assert World(1, 4, 1, 2).memory == available_memory() // 2
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\n")
    assert available_memory() >= megabytes * 1e6


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        # Version 2 of control groups: docker --cpus=3, half a core, no limit, a limit around the own group.
        ("0::/\n", {"cpu.max": "300000 100000"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 8),
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/cpu.max": "250000 100000", "slurm/cpu.max": "max 1"}, 3),
        # Version 1: a container does not see the folder of its group's path.
        (
            "4:cpu,cpuacct:/docker/3f\n",
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpuset:/a\n2:cpuacct:/a\n", {"cpuset/a/cpu.max": "100000 100000"}, 8),
        ("0::/\n", {"cpu.max": ""}, 8),
        ("", {}, 8),
    ],
)
def test_cores_are_no_more_than_the_quota_of_a_container(
    own: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_groups(own, files, tmp_path, monkeypatch)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert available_cores() == cores
