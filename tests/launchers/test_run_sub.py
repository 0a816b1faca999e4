"""run.sub on stand-ins for SLURM's commands: what the commands of the original's README come to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, environment

from cosmoflow_dali.config import CONFIGS, read_yaml, resolve

SBATCH = """#!/bin/bash
# Takes the options that run.sub is submitted with, and runs it at once.
while [[ "$1" == -* ]]; do
    case "$1" in -N) nodes="$2"; shift 2 ;; -t) time="$2"; shift 2 ;; *) exit 64 ;; esac
done
[[ -n "$nodes" && -n "$time" ]] || exit 65
cp "$1" slurm_script && shift
SLURM_JOB_ID=77 SLURM_JOB_NUM_NODES="$nodes" SLURM_SUBMIT_DIR="$PWD" exec bash slurm_script "$@"
"""

SRUN = """#!/bin/bash
printf '%s\\n' "srun $*|$RUN|$SEED|$STAGED_SINCE|$CONFIG_FILE|$DATADIR|$STAGING_DIR" >> "$SRUN_LOG"
[[ " $* " == *" ${FAILING:-nothing} "* || "$RUN" == "${FAILING:-nothing}" ]] && exit "${STATUS:-1}"
exit 0
"""

SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$SRUN_LOG"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What run.sub needs of a checkout, and the stand-ins."""
    for name in ("run.sub", "run_and_time.sh"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(CONFIGS, tmp_path / "configs")
    (tmp_path / "bin").mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def sh(checkout: Path, script: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `script` in bash: how it ended, and the commands that SLURM was given."""
    log = checkout / "srun.log"
    given = {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "SRUN_LOG": str(log), "PYTHON": "python"}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=checkout,
        env=environment() | given | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, log.read_text().splitlines() if log.exists() else []


STRONG = """
export CONT=mlperf-cosmoflow:v1.0
export LOGDIR=results/{nodes}x8x1/
export DATADIR=/gpfs/cosmoflow
export DGXNODES={nodes}
source configs/config_DGXA100_{shape}.sh
export CONFIG_FILE=submission_dgxa100_{shape}
sbatch -N ${{DGXNNODES}} -t ${{WALLTIME}} run.sub
"""


@pytest.mark.parametrize(("nodes", "shape"), [(128, "128x8x1_other"), (16, "16x8x1")])
def test_the_strong_scaling_commands_of_the_original(nodes: int, shape: str, checkout: Path) -> None:
    # In a shell in which another sequence has gone before, as the README's reader has it.
    done, asked = sh(
        checkout,
        "export DGXNODES=4\nsource configs/config_DGXA100_4x8x1.sh\n"
        + STRONG.format(nodes=nodes, shape=shape),
    )
    assert done.returncode == 0, done.stderr
    (run,) = (line for line in asked if "run_and_time.sh" in line)
    for words in (
        f"--nodes={nodes} --ntasks={8 * nodes} --ntasks-per-node=8",
        "--container-image=mlperf-cosmoflow:v1.0",
        f"{checkout}/results/{nodes}x8x1/77:",
        "/gpfs/cosmoflow:/gpfs/cosmoflow:ro",
        f"|submission_dgxa100_{shape}|/gpfs/cosmoflow|",
    ):
        assert words in run
    # Caches, the network, the runs, the checker.
    assert [
        "drop_caches" in asked[1],
        "allreduce_bench" in asked[0],
        "cosmoflow_dali.results" in asked[3],
    ] == [True] * 3


def test_the_weak_scaling_commands_of_the_original(checkout: Path) -> None:
    # As printed there it lacks the `source` that its first sequence shows, and sbatch would have no number.
    script = """
export CONT=mlperf-cosmoflow:v1.0
export LOGDIR=results/128x4x8x1_weak/
export DATADIR=/gpfs/cosmoflow
export DGXNODES=512   # 4 nodes x 128 instances
source configs/config_DGXA100_4x8x1.sh
export CONFIG_FILE=submission_dgxa100_4x8x1
sbatch -N ${DGXNNODES} -t ${WALLTIME} run.sub +instances=128
"""
    done, asked = sh(checkout, script, STAGING_DIR="/raid/cosmoflow", SEED="1000")
    assert done.returncode == 0, done.stderr
    (staging,) = (line for line in asked if "preprocess.stage" in line)
    assert (
        "--ntasks=4096" in staging and "--models 128" in staging and "--output-dir /raid/cosmoflow" in staging
    )
    runs = [line for line in asked if "run_and_time.sh" in line]
    assert all("--nodes=4 --ntasks=32 " in line for line in runs)
    firsts = sorted(int(match.group(1)) for line in runs if (match := re.search(r"--relative=(\d+)", line)))
    assert firsts == list(range(0, 512, 4))
    fields = [line.split("|") for line in runs]
    assert sorted((int(run), int(seed)) for _, run, seed, *_ in fields) == [
        (n, 999 + n) for n in range(1, 129)
    ]
    assert len({since for _, _, _, since, *_ in fields}) == 1 and fields[0][3].isdecimal()


RUN = "sbatch -N 2 -t 1 run.sub --epochs 3"


def test_bare_and_without_the_extras(checkout: Path) -> None:
    done, asked = sh(checkout, RUN, NCCL_TEST="0", CLEAR_CACHES="0", CHECK_COMPLIANCE="0", DGXNGPU="4")
    assert done.returncode == 0, done.stderr
    (line,) = asked
    assert "--container" not in line and "--ntasks=8" in line and "run_and_time.sh --epochs 3|" in line


def test_experiments_follow_one_another_with_seeds_of_their_own(checkout: Path) -> None:
    done, asked = sh(checkout, RUN, NEXP="3", SEED="5", NCCL_TEST="0", CLEAR_CACHES="0", CHECK_COMPLIANCE="0")
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1:3] for line in asked] == [["1", "5"], ["2", "6"], ["3", "7"]]


def test_one_that_fails_is_told_of_and_keeps_none_from_running(checkout: Path) -> None:
    done, asked = sh(checkout, RUN, NEXP="3", FAILING="2", NCCL_TEST="0", CLEAR_CACHES="0")
    assert done.returncode != 0 and "error: 1 of 3 runs have failed: 2" in done.stderr
    assert sum("run_and_time" in line for line in asked) == 3
    assert "cosmoflow_dali.results" in asked[-1]


def test_stopped_behind_a_checkpoint_it_is_requeued_and_runs_what_is_left(checkout: Path) -> None:
    variables = {"NEXP": "3", "NCCL_TEST": "0", "CLEAR_CACHES": "0", "CHECK_COMPLIANCE": "0"}
    done, asked = sh(checkout, RUN, FAILING="2", STATUS="75", **variables)
    assert done.returncode == 0 and asked[-1] == "scontrol requeue 77"
    assert [line.split("|")[1] for line in asked[:-1]] == ["1", "2"]
    (checkout / "srun.log").unlink()
    again, rest = sh(checkout, RUN, **variables)
    assert again.returncode == 0 and [line.split("|")[1] for line in rest] == ["2", "3"]
    # The seeds go on from the first one, which was drawn.
    assert int(rest[1].split("|")[2]) == int(rest[0].split("|")[2]) + 1 == int(asked[0].split("|")[2]) + 2


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DGXNNODES": "4"}, "DGXNNODES 4: the job has 2 nodes; submit with sbatch -N 4"),
        ({"DGXNODES": "4"}, "DGXNNODES 4"),
        ({"NUM_INSTANCES": "3"}, "NUM_INSTANCES 3: does not share out the job's 2 nodes"),
        ({"NUM_INSTANCES": "two"}, "NUM_INSTANCES two"),
        ({"NUM_INSTANCES": "2", "NEXP": "2"}, "NEXP 2"),
        ({"NUM_INSTANCES": "2", "STAGING_DIR": "/raid"}, "DATADIR"),
        ({"NEXP": "0"}, "NEXP 0"),
        ({"DGXNGPU": "all"}, "DGXNGPU all"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(variables: dict[str, str], said: str, checkout: Path) -> None:
    done, asked = sh(checkout, RUN, NCCL_TEST="0", CLEAR_CACHES="0", **variables)
    assert done.returncode != 0 and said in done.stderr and not asked


def test_caches_that_cannot_be_cleared_are_no_lie(checkout: Path) -> None:
    done, _ = sh(checkout, RUN, NCCL_TEST="0", FAILING="-c")
    assert done.returncode == 0 and "the page caches were not cleared" in done.stderr


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("config_DGX*.sh")), ids=lambda path: path.stem)
def test_each_system_has_its_configuration_and_the_ranks_for_its_batch(path: Path, checkout: Path) -> None:
    done, _ = sh(
        checkout, f"source configs/{path.name}; echo $DGXNNODES $DGXNGPU $CONFIG_FILE $WALLTIME $DGXSYSTEM"
    )
    nodes, gpus, name, walltime, system = done.stdout.split()
    config, _ = resolve(read_yaml(CONFIGS / f"{name}.yaml"))
    assert config.global_batch == int(nodes) * int(gpus) * config.loader.batch_size
    assert path.stem == f"config_{system}" and re.fullmatch(r"\d\d:\d\d:00", walltime)
    assert config.target_mae == 0.124 and config.shuffle
