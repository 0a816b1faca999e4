"""The world that launchers' variables describe, complete or not, in any nesting."""

from __future__ import annotations

import pytest

from pipelines.distributed.world import World
from pipelines.errors import ConfigError

Variables = dict[str, str]


def variables(text: str) -> Variables:
    """Return the variables of a line of NAME=VALUE words."""
    return dict(word.split("=", 1) for word in text.split(" "))


def srun(rank: int, tasks: str, local: int, node: int = 0) -> str:
    """Return what srun sets for number `rank` of `tasks`, such as "16 8(x2)"."""
    size, per_node = tasks.split()
    return (
        f"SLURM_PROCID={rank} SLURM_STEP_NUM_TASKS={size} SLURM_NTASKS={size} SLURM_LOCALID={local} "
        f"SLURM_NODEID={node} SLURM_STEP_TASKS_PER_NODE={per_node}"
    )


HOOK = "RANK=13 WORLD_SIZE=16 LOCAL_RANK=5 MASTER_ADDR=n1 MASTER_PORT=61100 OMP_NUM_THREADS=1"
RECIPE = "RANK=13 WORLD_SIZE=16"
TORCHRUN = "RANK=13 WORLD_SIZE=16 LOCAL_RANK=5 LOCAL_WORLD_SIZE=8"
AGENT = f"{TORCHRUN} GROUP_RANK=1 GROUP_WORLD_SIZE=2"
OMPI = (
    "OMPI_COMM_WORLD_RANK=13 OMPI_COMM_WORLD_SIZE=16 "
    "OMPI_COMM_WORLD_LOCAL_RANK=5 OMPI_COMM_WORLD_LOCAL_SIZE=8 PMIX_RANK=13"
)
PMI = "PMI_RANK=13 PMI_SIZE=16"
HYDRA = f"{PMI} MPI_LOCALRANKID=5 MPI_LOCALNRANKS=8"
FLUX = f"{PMI} FLUX_TASK_RANK=13 FLUX_JOB_SIZE=16 FLUX_TASK_LOCAL_ID=5 FLUX_JOB_NNODES=2"
STEP = srun(13, "16 8(x2)", 5, 1)

WORLDS = {
    # Complete, and of one launcher.
    TORCHRUN: (13, 16, 5, 8, "torchrun"),
    OMPI: (13, 16, 5, 8, "mpirun"),
    HYDRA: (13, 16, 5, 8, "mpirun"),
    STEP: (13, 16, 5, 8, "srun"),
    "RANK=13 WORLD_SIZE=16 LOCAL_RANK=5 LOCAL_SIZE=8": (13, 16, 5, 8, "torchrun"),
    f"{PMI} PMI_LOCAL_RANK=5 PMI_LOCAL_SIZE=8 PALS_RANKID=13 PALS_LOCAL_RANKID=5": (13, 16, 5, 8, "mpirun"),
    OMPI.replace("OMPI_COMM_WORLD", "MV2_COMM_WORLD"): (13, 16, 5, 8, "mpirun"),
    OMPI.replace("OMPI_COMM_WORLD", "HOROVOD"): (13, 16, 5, 8, "horovodrun"),
    f"{OMPI} {OMPI.replace('OMPI_COMM_WORLD', 'JSM_NAMESPACE')}": (13, 16, 5, 8, "mpirun"),
    # Completed by the launcher around it, which also connects the ranks.
    f"{HOOK} {STEP}": (13, 16, 5, 8, "srun"),
    f"{RECIPE} {STEP}": (13, 16, 5, 8, "srun"),
    f"{RECIPE} {OMPI}": (13, 16, 5, 8, "mpirun"),
    f"{RECIPE} {HYDRA}": (13, 16, 5, 8, "mpirun"),
    f"{STEP} {PMI} PMIX_RANK=13": (13, 16, 5, 8, "srun"),
    f"{FLUX} LOCAL_WORLD_SIZE=8": (13, 16, 5, 8, "flux"),
    f"{RECIPE} {FLUX} LOCAL_RANK=5 LOCAL_WORLD_SIZE=8": (13, 16, 5, 8, "flux"),
    # Nodes with different numbers of ranks, in either direction, and ranks dealt to the nodes in turn.
    srun(9, "11 4(x2),3", 1, 2): (9, 11, 1, 3, "srun"),
    srun(6, "11 3,4(x2)", 3, 1): (6, 11, 3, 4, "srun"),
    srun(3, "7 3,2(x2)", 1, 0): (3, 7, 1, 3, "srun"),
    # One launcher starts another.
    f"{TORCHRUN} {srun(1, '2 1(x2)', 0, 1)}": (13, 16, 5, 8, "torchrun"),
    f"{TORCHRUN} {srun(1, '2 1(x2)', 0, 1)} PMI_RANK=1 PMI_SIZE=2 PMIX_RANK=1": (13, 16, 5, 8, "torchrun"),
    f"{OMPI} {srun(0, '2 1(x2)', 0)}": (13, 16, 5, 8, "mpirun"),
    # torchrun's agents have an order of their own, and may have different numbers of ranks.
    f"{AGENT} {srun(0, '2 1(x2)', 0)}": (13, 16, 5, 8, "torchrun"),
    f"{AGENT.replace('=16', '=15')} {srun(0, '2 1(x2)', 0)}": (13, 15, 5, 8, "torchrun"),
    f"{HYDRA} {srun(1, '2 1(x2)', 0, 1)}": (13, 16, 5, 8, "mpirun"),
    f"{OMPI} {srun(0, '1 1', 0)}": (13, 16, 5, 8, "mpirun"),
    # One rank: a batch script or the shell of salloc, which no step has started; and a size of 1.
    "HOME=/": (0, 1, 0, 1, "none"),
    "SLURM_PROCID=0 SLURM_NTASKS=16 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_TASKS_PER_NODE=8(x2)": (
        0, 1, 0, 1, "none",
    ),
    "SLURM_NTASKS=16 SLURM_JOB_NUM_NODES=2": (0, 1, 0, 1, "none"),
    "WORLD_SIZE=8": (0, 1, 0, 1, "none"),
    "RANK=0 WORLD_SIZE=1": (0, 1, 0, 1, "torchrun"),
    f"RANK=0 WORLD_SIZE=1 {srun(0, '1 1', 0)}": (0, 1, 0, 1, "srun"),
}  # fmt: skip


@pytest.mark.parametrize("text", WORLDS)
def test_world_of_a_launcher(text: str) -> None:
    assert World.detect(variables(text)) == World(*WORLDS[text])


REFUSED = {
    # Nothing gives the local size: a pod of PyTorchJob, or the recipe without srun.
    RECIPE: "LOCAL_RANK",
    HOOK: "LOCAL_WORLD_SIZE",
    f"{RECIPE} LOCAL_WORLD_SIZE=8": "LOCAL_RANK",
    f"{RECIPE} SLURM_PROCID=0 SLURM_NTASKS=16": "LOCAL_RANK",
    f"{PMI} PALS_RANKID=13 PALS_LOCAL_RANKID=5": "LOCAL_WORLD_SIZE",
    FLUX: "LOCAL_WORLD_SIZE",
    # A rank of unknown size.
    "RANK=0": "RANK",
    "OMPI_COMM_WORLD_RANK=3": "OMPI_COMM_WORLD_RANK",
    "PMIX_RANK=3 PMIX_NAMESPACE=x": "PMIX_RANK",
    "SLURM_PROCID=3 SLURM_NTASKS=8": "SLURM_PROCID",
    # Contradictions: ranks of another job, a local rank or size of another node or launcher.
    f"{TORCHRUN} {srun(9, '11 4(x2),3', 1, 2)}": "RANK and WORLD_SIZE",
    f"RANK=0 WORLD_SIZE=1 {STEP}": "RANK and WORLD_SIZE",
    f"RANK=0 WORLD_SIZE=16 {STEP}": "RANK and WORLD_SIZE",
    f"RANK=0 WORLD_SIZE=16 {srun(1, '2 1(x2)', 0, 1)}": "RANK and WORLD_SIZE",
    # Each task has started a torchrun of its own.
    f"{AGENT.replace('WORLD_SIZE=2', 'WORLD_SIZE=1')} {srun(0, '2 1(x2)', 0)}": "RANK and WORLD_SIZE",
    f"OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 {STEP}": "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE",
    f"{RECIPE} LOCAL_RANK=0 {STEP}": "LOCAL_RANK",
    f"{RECIPE} LOCAL_RANK=5 LOCAL_WORLD_SIZE=16 {STEP}": "LOCAL_WORLD_SIZE",
    f"{RECIPE} LOCAL_RANK=5 LOCAL_WORLD_SIZE=4": "LOCAL_RANK",
    f"{RECIPE} LOCAL_RANK=5 LOCAL_WORLD_SIZE=17": "LOCAL_WORLD_SIZE",
    "RANK=0 WORLD_SIZE=1 LOCAL_RANK=3": "LOCAL_RANK",
    # No numbers.
    TORCHRUN.replace("=13", "=-1"): "RANK",
    TORCHRUN.replace("=13", "=16"): "RANK",
    TORCHRUN.replace("=13", "="): "RANK",
    TORCHRUN.replace("=13", "=\u00b2"): "RANK",
    TORCHRUN.replace("=16", "=sixteen"): "WORLD_SIZE",
    TORCHRUN.replace("=5", "=5.0"): "LOCAL_RANK",
    TORCHRUN.replace("=8", "=0"): "LOCAL_WORLD_SIZE",
    STEP.replace("=8(x2)", "=8(x"): "SLURM_STEP_TASKS_PER_NODE",
    STEP.replace("=8(x2)", "="): "SLURM_STEP_TASKS_PER_NODE",
    srun(9, "11 4(x2),3", 1, 3): "SLURM_NODEID",
    srun(9, "11 4(x2),3", 1).replace("SLURM_NODEID=0 ", ""): "SLURM_NODEID",
}


@pytest.mark.parametrize("text", REFUSED)
def test_senseless_variables_are_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        World.detect(variables(text))
    assert refused.value.key == REFUSED[text]


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(ConfigError, match="set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"):
        World.detect(variables(RECIPE))
    with pytest.raises(ConfigError, match=r"SLURM_PROCID and .* 13 and 16: unset the stale ones"):
        World.detect(variables(f"RANK=0 WORLD_SIZE=1 {STEP}"))
