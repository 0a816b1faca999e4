"""Who we are, from what each launcher says."""

from __future__ import annotations

import pytest

from cosmoflow_dali.dist import World
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
    assert World.detect(SRUN | OMPI).launcher == "mpirun"


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
