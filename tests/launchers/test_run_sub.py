"""run.sub with fake SLURM commands, and the commands of the original's README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, environment

from cosmoflow_dali.compute.optim import SGDConfig
from cosmoflow_dali.compute.schedule import StepDecayConfig
from cosmoflow_dali.config import CONFIGS, read_yaml, resolve
from cosmoflow_dali.models.reference import ReferenceConfig

SBATCH = """#!/bin/bash
# Accept the options that run.sub is submitted with, and run it at once.
while [[ "$1" == -* ]]; do
    case "$1" in -N) nodes="$2"; shift 2 ;; -t) time="$2"; shift 2 ;; *) exit 64 ;; esac
done
[[ -n "$nodes" && -n "$time" ]] || exit 65
cp "$1" slurm_script && shift
SLURM_JOB_ID="${JOB:-77}" SLURM_JOB_NUM_NODES="$nodes" SLURM_SUBMIT_DIR="$PWD" exec bash slurm_script "$@"
"""

SRUN = """#!/bin/bash
printf '%s\\n' "srun $*|$RUN|$SEED|$STAGED_SINCE|$CONFIG_FILE|$DATADIR|$STAGING_DIR" >> "$SRUN_LOG"
[[ " $* " == *" ${FAILING:-nothing} "* || "$RUN" == "${FAILING:-nothing}" ]] && exit "${STATUS:-1}"
[[ -n "${RUNS_STEPS:-}" ]] || exit 0
while [[ "$1" == -* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=8 SLURM_PROCID=0 SLURM_LOCALID=3 SLURM_STEP_TASKS_PER_NODE=8
[[ "${SLURM_EXPORT_ENV:-ALL}" == ALL ]] || exec env -i PATH="$PATH" RECORD="$RECORD" "$@"
exec "$@"
"""

RECORDER = """#!/bin/bash
# Replaces the interpreter: record its arguments, one per line, and some of its environment.
[[ "$1" != -c ]] || exec "$REAL_PYTHON" "$@"
{
    echo "== ${SLURM_LOCALID:-}${OMPI_COMM_WORLD_LOCAL_RANK:-}"
    printf '%s\\n' "$@"
    env | grep -E '^(PLACE|RENDEZVOUS|MASTER)' | sort
} >> "$RECORD"
exit "${ENDING:-0}"
"""

MPIRUN = """#!/bin/bash
echo "mpirun $*" >> "$RECORD"
while [[ "$1" != bash ]]; do shift; done
export OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2
exec "$@"
"""

SCONTROL = """#!/bin/bash
if [[ "$1" == show ]]; then
    echo "   Command=${SUBMITTED:-}"
    exit
fi
echo "scontrol $*" >> "$SRUN_LOG"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Create the part of a checkout that run.sub needs, with fake commands."""
    for name in ("run.sub", "run_and_time.sh"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(CONFIGS, tmp_path / "configs")
    (tmp_path / "bin").mkdir()
    commands = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "python": RECORDER, "mpirun": MPIRUN}
    for name, script in commands.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def sh(checkout: Path, script: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `script` in bash; return its outcome and the commands given to SLURM."""
    log = checkout / "srun.log"
    given = {"PATH": f"{checkout}/bin:{os.environ['PATH']}", "SRUN_LOG": str(log), "PYTHON": "python"}
    given |= {"RECORD": str(checkout / "record"), "REAL_PYTHON": sys.executable}
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
def test_strong_scaling_commands_of_the_original(nodes: int, shape: str, checkout: Path) -> None:
    # After another command sequence in the same shell, as a reader of the README has it.
    done, commands = sh(
        checkout,
        "export DGXNODES=4\nsource configs/config_DGXA100_4x8x1.sh\n"
        + STRONG.format(nodes=nodes, shape=shape),
    )
    assert done.returncode == 0, done.stderr
    (run,) = (line for line in commands if "run_and_time.sh" in line)
    for words in (
        f"--nodes={nodes} --ntasks={8 * nodes} --ntasks-per-node=8",
        "--container-image=mlperf-cosmoflow:v1.0",
        f"{checkout}/results/{nodes}x8x1/77:",
        "/gpfs/cosmoflow:/gpfs/cosmoflow:ro",
        f"|submission_dgxa100_{shape}|/gpfs/cosmoflow|",
    ):
        assert words in run
    # Network test, caches, run, checker.
    assert [
        "drop_caches" in commands[1],
        "allreduce_bench" in commands[0],
        "cosmoflow_dali.results" in commands[3],
    ] == [True] * 3


def test_weak_scaling_commands_of_the_original(checkout: Path) -> None:
    # The printed commands lack the `source` of the first sequence, without which sbatch has no node count.
    script = """
export CONT=mlperf-cosmoflow:v1.0
export LOGDIR=results/128x4x8x1_weak/
export DATADIR=/gpfs/cosmoflow
export DGXNODES=512   # 4 nodes x 128 instances
source configs/config_DGXA100_4x8x1.sh
export CONFIG_FILE=submission_dgxa100_4x8x1
sbatch -N ${DGXNNODES} -t ${WALLTIME} run.sub +instances=128
"""
    done, commands = sh(
        checkout,
        script,
        STAGING_DIR="/raid/cosmoflow",
        SEED="1000",
        STAGING_OPTIONS="--threads 16 --direct-io",
    )
    assert done.returncode == 0, done.stderr
    (staging,) = (line for line in commands if "preprocess.stage" in line)
    assert (
        "--ntasks=4096" in staging and "--models 128" in staging and "--output-dir /raid/cosmoflow" in staging
    )
    assert "--threads 16 --direct-io|" in staging
    runs = [line for line in commands if "run_and_time.sh" in line]
    assert all("--nodes=4 --ntasks=32 " in line for line in runs)
    firsts = sorted(int(match.group(1)) for line in runs if (match := re.search(r"--relative=(\d+)", line)))
    assert firsts == list(range(0, 512, 4))
    fields = [line.split("|") for line in runs]
    assert sorted((int(run), int(seed)) for _, run, seed, *_ in fields) == [
        (n, 999 + n) for n in range(1, 129)
    ]
    assert len({since for _, _, _, since, *_ in fields}) == 1 and fields[0][3].isdecimal()


RUN = "sbatch -N 2 -t 1 run.sub --epochs 3"


def test_without_container_and_extra_steps(checkout: Path) -> None:
    done, commands = sh(checkout, RUN, NCCL_TEST="0", CLEAR_CACHES="0", CHECK_COMPLIANCE="0", DGXNGPU="4")
    assert done.returncode == 0, done.stderr
    (line,) = commands
    assert "--container" not in line and "--ntasks=8" in line and "run_and_time.sh --epochs 3|" in line


def test_consecutive_experiments_have_their_own_seeds(checkout: Path) -> None:
    done, commands = sh(
        checkout, RUN, NEXP="3", SEED="5", NCCL_TEST="0", CLEAR_CACHES="0", CHECK_COMPLIANCE="0"
    )
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1:3] for line in commands] == [["1", "5"], ["2", "6"], ["3", "7"]]


def test_failed_run_is_reported_and_the_others_run(checkout: Path) -> None:
    done, commands = sh(checkout, RUN, NEXP="3", FAILING="2", NCCL_TEST="0", CLEAR_CACHES="0")
    assert done.returncode != 0 and "error: 1 of 3 runs failed: 2" in done.stderr
    assert sum("run_and_time" in line for line in commands) == 3
    assert "cosmoflow_dali.results" in commands[-1]


def test_stopped_job_is_requeued_and_runs_the_rest(checkout: Path) -> None:
    variables = {"NEXP": "3", "NCCL_TEST": "0", "CLEAR_CACHES": "0", "CHECK_COMPLIANCE": "0"}
    done, commands = sh(checkout, RUN, FAILING="2", STATUS="75", **variables)
    assert done.returncode == 0 and commands[-1] == "scontrol requeue 77"
    assert [line.split("|")[1] for line in commands[:-1]] == ["1", "2"]
    (checkout / "srun.log").unlink()
    again, rest = sh(checkout, RUN, **variables)
    assert again.returncode == 0 and [line.split("|")[1] for line in rest] == ["2", "3"]
    # The seeds continue from the first one, which was drawn.
    assert int(rest[1].split("|")[2]) == int(rest[0].split("|")[2]) + 1 == int(commands[0].split("|")[2]) + 2


INVALID = (
    ({"DGXNNODES": "4"}, "DGXNNODES 4: the job has 2 nodes; submit with sbatch -N 4"),
    ({"DGXNODES": "4"}, "DGXNNODES 4"),
    ({"NUM_INSTANCES": "3"}, "NUM_INSTANCES 3"),
    ({"NUM_INSTANCES": "two"}, "NUM_INSTANCES two"),
    ({"NUM_INSTANCES": "2", "NEXP": "2"}, "NEXP 2"),
    ({"NUM_INSTANCES": "2", "STAGING_DIR": "/raid"}, "DATADIR"),
    ({"NEXP": "0"}, "NEXP 0"),
    ({"SEED": "08"}, "SEED 08"),
    ({"SEED": "abc"}, "SEED abc"),
    ({"RENDEZVOUS_TIMEOUT": "long"}, "RENDEZVOUS_TIMEOUT long"),
    ({"CONT": "x", "STAGING_DIR": "$TMPDIR/x"}, "STAGING_DIR $TMPDIR/x"),
    ({"CONT": "x", "DATADIR": "/gpfs/my data"}, "DATADIR /gpfs/my data: a path with a blank, comma or colon"),
    ({"CONT": "x", "DATADIR": "/gpfs/Om=0.3,s8=0.8"}, "DATADIR /gpfs/Om=0.3,s8=0.8"),
    ({"CONT": "x", "STAGING_DIR": "/raid/a:b"}, "STAGING_DIR /raid/a:b"),
    ({"CONT": "x", "LOGDIR": "re,sults"}, "LOGDIR "),
    ({"DGXNGPU": "all"}, "DGXNGPU all"),
)


def test_invalid_variables_are_refused_by_name(checkout: Path) -> None:
    for variables, message in INVALID:
        done, commands = sh(checkout, RUN, NCCL_TEST="0", CLEAR_CACHES="0", **variables)
        assert done.returncode != 0 and message in done.stderr and not commands
        assert not list(checkout.glob("results/*/first_seed"))


def test_failure_to_clear_caches_is_reported(checkout: Path) -> None:
    done, _ = sh(checkout, RUN, NCCL_TEST="0", FAILING="-c")
    assert done.returncode == 0 and "warning: CLEAR_CACHES" in done.stderr


def calls(checkout: Path) -> list[list[str]]:
    """Return what the recorder wrote for each call: local rank, arguments, environment."""
    return [call.splitlines() for call in (checkout / "record").read_text().split("== ")[1:]]


VARIABLES = {
    "LOGDIR": "logs",
    "DATESTAMP": "stamp",
    "DATADIR": "/gpfs/data",
    "CONFIG_FILE": "reference",
    "DGXNODES": "2",
    "DGXNNODES": "3",
    "DGXNGPU": "4",
    "DGXSYSTEM": "B's: box",
    "WALLTIME": "00:12:00",
    "NEXP": "2",
    "NUM_INSTANCES": "1",
    "SEED": "40",
    "STAGING_DIR": "$TMPDIR/it's",
    "NCCL_TEST": "1",
    "CLEAR_CACHES": "1",
    "DROPCACHE_CMD": "echo dropped >> $RECORD.dropped",
    "CHECK_COMPLIANCE": "1",
    "BIND": "env PLACE=on{}",
    "RENDEZVOUS_TIMEOUT": "77",
    "RENDEZVOUS_ADDR": "10.1.2.3",
    "PYTHON": "./bin/python",
}


def test_all_documented_variables_take_effect(checkout: Path) -> None:
    table = (ROOT / "docs" / "scale.md").read_text().partition("| variable |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    # Other tests cover CONT (containers) and STAGING_OPTIONS (many models).
    named = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    assert named == {*VARIABLES, "CONT", "STAGING_OPTIONS"}
    given = VARIABLES | {"MASTER_ADDR": "stale", "MASTER_PORT": "1", "RUNS_STEPS": "1"}
    done, commands = sh(checkout, 'sbatch -N 2 -t "$WALLTIME" run.sub --epochs 3', **given)
    assert done.returncode == 0, done.stderr
    assert sum("--wait=137 " in line and "--ntasks=8 --ntasks-per-node=4 " in line for line in commands) == 3
    assert (checkout / "record.dropped").read_text() == "dropped\n" * 2
    network, first, second, results = calls(checkout)
    rendezvous = ["RENDEZVOUS_ADDR=10.1.2.3", "RENDEZVOUS_TIMEOUT=77"]
    assert network == ["3", f"{checkout}/benchmarks/allreduce_bench.py", *rendezvous]
    logs = f"{checkout}/logs/stamp"
    for run, seed, recorded in (("1", "40", first), ("2", "41", second)):
        assert recorded == [
            "3", "-m", "cosmoflow_dali.train", "--config", f"{checkout}/configs/reference.yaml",
            "--run-dir", f"{logs}/{run}", "--resume", "--data-dir", "/gpfs/data", "--seed", seed,
            "--set", "data.stage.dir='$TMPDIR/it''s'", "--set", "submission.platform='B''s: box'",
            "--caches-cleared", "--epochs", "3", "PLACE=on3", *rendezvous,
        ]  # fmt: skip
        assert "RESULT,COSMOFLOW_HPC,," in Path(f"{logs}/{run}.log").read_text()
    assert results[:4] == ["3", "-m", "cosmoflow_dali.results", logs]
    for setting in ("data.stage.dir='$TMPDIR/it''s'", "submission.platform='B''s: box'"):
        assert yaml.safe_load(setting.partition("=")[2]) in VARIABLES.values()


QUIET = {"NCCL_TEST": "0", "CLEAR_CACHES": "0", "CHECK_COMPLIANCE": "0"}


@pytest.mark.parametrize("ending", ["1", "75"])
def test_failed_or_stopped_run_prints_no_result_line(ending: str, checkout: Path) -> None:
    sh(checkout, RUN, RUNS_STEPS="1", ENDING=ending, LOGDIR="logs", **QUIET)
    assert (checkout / "logs/77/1.log").read_text() == ""
    assert (checkout / "logs/77/1.status").read_text() == f"{ending}\n"


def test_new_job_continues_the_runs_of_an_earlier_one(checkout: Path) -> None:
    given = QUIET | {"NEXP": "2", "DATESTAMP": "campaign"}
    done, commands = sh(checkout, RUN, FAILING="2", **given)
    assert done.returncode != 0
    again, rest = sh(checkout, RUN, JOB="78", **given)
    assert again.returncode == 0 and [line.split("|")[1] for line in commands] == ["1", "2"]
    # Only the second run, with the same seed.
    assert rest[2:] == commands[1:2]


@pytest.mark.parametrize("stale", ["75\n", ""])
def test_run_without_status_counts_as_failed(stale: str, checkout: Path) -> None:
    (checkout / "results/77").mkdir(parents=True)
    (checkout / "results/77/1.status").write_text(stale)
    # As if the shell of the step was killed.
    script = (checkout / "run.sub").read_text()
    killed = script.replace('echo "${status}" >"${LOGDIR}/${run}.status"', "true")
    assert killed != script
    (checkout / "run.sub").write_text(killed)
    done, commands = sh(checkout, RUN, **QUIET)
    assert done.returncode == 1 and "error: 1 of 1 runs failed: 1" in done.stderr
    assert not any("scontrol" in line for line in commands)


@pytest.mark.parametrize(
    ("step", "variables"),
    [
        ("{checkout}/benchmarks/allreduce_bench.py", {}),
        ("-c", {}),
        ("preprocess.stage", {"NUM_INSTANCES": "2", "STAGING_DIR": "/raid", "DATADIR": "/gpfs"}),
        ("{checkout}/run_and_time.sh", {}),
    ],
)
def test_step_ended_by_a_signal_requeues_the_job(
    step: str, variables: dict[str, str], checkout: Path
) -> None:
    step = step.format(checkout=checkout)
    done, commands = sh(checkout, RUN, FAILING=step, STATUS="143", **variables)
    assert done.returncode == 0 and commands[-1] == "scontrol requeue 77" and step in commands[-2]
    assert "stopped by a signal; the job is requeued" in done.stdout


def test_failed_network_test_ends_the_job(checkout: Path) -> None:
    done, commands = sh(checkout, RUN, FAILING=f"{checkout}/benchmarks/allreduce_bench.py")
    assert done.returncode == 1 and "error: NCCL_TEST" in done.stderr and len(commands) == 1


def test_models_start_after_incomplete_staging(checkout: Path) -> None:
    staged = {"NUM_INSTANCES": "2", "STAGING_DIR": "/raid", "DATADIR": "/gpfs"}
    done, commands = sh(checkout, RUN, FAILING="preprocess.stage", **staged, **QUIET)
    assert done.returncode == 0 and "warning: STAGING_DIR" in done.stderr
    assert sum("run_and_time.sh" in line for line in commands) == 2


def test_variables_reach_the_ranks_of_a_job_that_exports_none(checkout: Path) -> None:
    # sbatch --export=NONE sets this variable, and srun obeys it.
    done, _ = sh(checkout, RUN, SLURM_EXPORT_ENV="NONE", RUNS_STEPS="1", SEED="5", **QUIET)
    assert done.returncode == 0, done.stderr
    words = (checkout / "record").read_text().splitlines()
    assert words[words.index("--seed") + 1] == "5"
    assert words[words.index("--run-dir") + 1].endswith("results/77/1")


def test_container_mounts(checkout: Path) -> None:
    folder = checkout.parent / f"{checkout.name}.elsewhere"
    folder.mkdir()
    (folder / "own.yaml").write_text("")
    config = os.path.relpath(folder / "own.yaml", checkout)
    given = {"CONT": "image.sqsh", "STAGING_DIR": "/raid/x", "DATADIR": "/gpfs", "CONFIG_FILE": config}
    done, commands = sh(checkout, RUN, **given, **QUIET)
    assert done.returncode == 0, done.stderr
    # Mounted folders must exist on each node.
    assert commands.pop(0).startswith("srun --ntasks=2 --ntasks-per-node=1 --mpi=none mkdir -p /raid/x|")
    mounts = [f"{checkout}:{checkout}", f"{checkout}/results/77:{checkout}/results/77", "/gpfs:/gpfs:ro"]
    mounts += ["/raid/x:/raid/x", f"{folder}/own.yaml:{folder}/own.yaml:ro"]
    assert f"--container-mounts={','.join(mounts)} " in commands[0]
    assert f"|{folder}/own.yaml|" in commands[0]


def test_a_url_is_not_mounted_in_a_container(checkout: Path) -> None:
    done, commands = sh(checkout, RUN, CONT="image.sqsh", DATADIR="s3://bucket/set", **QUIET)
    assert done.returncode == 0, done.stderr
    mounts = [f"{checkout}:{checkout}", f"{checkout}/results/77:{checkout}/results/77"]
    assert f"--container-mounts={','.join(mounts)} " in commands[0]
    assert "|s3://bucket/set|" in commands[0]


def test_run_outside_slurm_is_one_rank(checkout: Path) -> None:
    done, _ = sh(checkout, "DATADIR=/data ./run_and_time.sh --epochs 2", RUN="lone")
    assert done.returncode == 0 and "RESULT,COSMOFLOW_HPC,," in done.stdout
    assert calls(checkout) == [
        ["", "-m", "cosmoflow_dali.train", "--config", f"{checkout}/configs/default.yaml",
         "--run-dir", "results/lone", "--resume", "--data-dir", "/data", "--epochs", "2"],
    ]  # fmt: skip


def test_run_outside_slurm_starts_a_rank_per_gpu(checkout: Path) -> None:
    done, _ = sh(checkout, "./run_and_time.sh --epochs 2", DGXNGPU="2", SEED="4", BIND="env PLACE={}")
    assert done.returncode == 0, done.stderr
    started, *_ = (checkout / "record").read_text().splitlines()
    assert started == f"mpirun -n 2 --bind-to none bash {checkout}/run_and_time.sh --epochs 2"
    ((place, *recorded),) = calls(checkout)
    assert place == "1" and recorded[-5:] == ["--seed", "4", "--epochs", "2", "PLACE=1"]


def test_run_in_the_shell_of_a_job_starts_a_rank_per_gpu(checkout: Path) -> None:
    # salloc's shell is a step of one task; so is that of srun --pty.
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    sh(checkout, "./run_and_time.sh", DGXNGPU="2", SLURM_STEP_TASKS_PER_NODE="1", **step)
    assert (checkout / "record").read_text().startswith("mpirun -n 2 ")


def test_run_of_any_launcher_is_one_of_its_ranks(checkout: Path) -> None:
    rank = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    done, _ = sh(checkout, "./run_and_time.sh", DGXNGPU="2", BIND="env PLACE={}", **rank)
    assert done.returncode == 0 and "RESULT" not in done.stdout
    ((_, *recorded),) = calls(checkout)
    assert recorded[:2] == ["-m", "cosmoflow_dali.train"] and recorded[-1] == "PLACE=1"
    (checkout / "record").unlink()
    refused, _ = sh(checkout, "./run_and_time.sh", RANK="3", WORLD_SIZE="8")
    assert refused.returncode == 1 and refused.stderr.startswith("error: LOCAL_RANK")
    assert not (checkout / "record").exists()


@pytest.fixture
def elsewhere(checkout: Path) -> Path:
    """Create a user's folder with a configuration and with modules that are not the checkout's."""
    folder = checkout / "a user's #1 folder"
    (folder / "configs").mkdir(parents=True)
    for name in ("own.yaml", "default", "yaml.py", "preprocess.py", "configs/default.yaml"):
        (folder / name).write_text("")
    return folder


def test_names_of_a_run_are_those_of_the_working_folder(checkout: Path, elsewhere: Path) -> None:
    script = f'cd "{elsewhere}"; ../run_and_time.sh'
    given = {
        "DATADIR": "data",
        "STAGING_DIR": "staged",
        "LOGDIR": "logs",
        "RUN": "1",
        "PYTHON": "../bin/python",
    }
    done, _ = sh(checkout, script, CONFIG_FILE="own.yaml", **given)
    assert done.returncode == 0, done.stderr
    ((_, *recorded),) = calls(checkout)
    assert recorded[2:8] == ["--config", "own.yaml", "--run-dir", "logs/1", "--resume", "--data-dir"]
    assert recorded[8:11] == ["data", "--set", "data.stage.dir='staged'"]
    # The default is the checkout's, also if the working folder has a file of its name.
    for name in ("", "configs/reference.yaml"):
        (checkout / "record").unlink()
        assert sh(checkout, script, CONFIG_FILE=name)[0].returncode == 0
        ((_, *recorded),) = calls(checkout)
        assert recorded[3] == f"{checkout}/configs/{'reference' if name else 'default'}.yaml"


def test_script_may_be_started_by_a_symbolic_link(checkout: Path, elsewhere: Path) -> None:
    (elsewhere / "train").symlink_to("../run_and_time.sh")
    for command in ("./train", "bash train", 'PATH="$PWD:$PATH" train'):
        done, _ = sh(checkout, f'cd "{elsewhere}"; {command}', CONFIG_FILE="own.yaml", PYTHON="../bin/python")
        assert done.returncode == 0, done.stderr


def test_runs_that_start_together_have_folders_of_their_own(checkout: Path) -> None:
    done, _ = sh(
        checkout,
        'for i in 1 2 3; do RECORD="$RECORD$i" ./run_and_time.sh & done; wait; cat "$RECORD"? > "$RECORD"',
    )
    assert done.returncode == 0, done.stderr
    folders = {recorded[recorded.index("--run-dir") + 1] for recorded in calls(checkout)}
    assert len(folders) == 3 and all(folder.startswith("results/") for folder in folders)


@pytest.mark.parametrize(
    "submitted", ["{checkout}/run.sub --epochs 3", "{checkout}/run.sub", "{checkout}/bin/job --epochs 3", ""]
)
def test_names_of_a_job_are_those_of_the_folder_of_its_submission(
    submitted: str, checkout: Path, elsewhere: Path
) -> None:
    # Pyxis cannot mount a folder with blanks in its name.
    elsewhere = elsewhere.rename(checkout / "a_user's_#1_folder")
    (checkout / "bin" / "job").symlink_to("../run.sub")
    script = f'cd "{elsewhere}"; sbatch -N 2 -t 1 ../run.sub --epochs 3'
    given = {"CONT": "image", "DATADIR": "data", "CONFIG_FILE": "own.yaml", "LOGDIR": "logs"}
    # Without SLURM's answer, the user names the checkout.
    found = {"SUBMITTED": submitted.format(checkout=checkout)} if submitted else {"CHECKOUT": ".."}
    done, commands = sh(checkout, script, **given, **found, **QUIET)
    assert done.returncode == 0, done.stderr
    (line,) = commands
    mounts = [checkout, elsewhere / "logs/77", elsewhere]
    assert ",".join(f"{folder}:{folder}" for folder in mounts) in line
    assert f"{elsewhere}/data:{elsewhere}/data:ro" in line and f"|{elsewhere}/own.yaml|" in line
    assert f"--container-workdir={elsewhere} " in line
    assert f"bash {checkout}/run_and_time.sh --epochs 3|" in line


def test_job_without_its_checkout_is_refused(checkout: Path, elsewhere: Path) -> None:
    done, commands = sh(checkout, f'cd "{elsewhere}"; sbatch -N 2 -t 1 ../run.sub', **QUIET)
    assert done.returncode == 1 and done.stderr.startswith("error: CHECKOUT") and not commands


PUBLISHED = {
    # Global batch, initial and base learning rate, warm-up, decay at epochs, factors, dropout, weight decay.
    "dgxa100_16x8x1": (128, 0.001, 0.004, 4, (16, 32), (0.25, 0.125), 0.5, 0.0),
    "dgxa100_128x8x1_other": (1024, 0.001, 0.012, 0, (32, 64), (0.25, 0.125), 0.5, 0.0),
    "dgxa100_4x8x1": (32, 0.001, 0.004, 2, (4, 6), (0.25, 0.0625), 0.5, 0.0),
    "dgxh100_64x8x1": (512, 0.006, 0.024, 6, (20, 22, 23, 24), (0.5, 0.25, 0.125, 0.0625), 0.0, 0.02),
    "dgxh100_4x8x1": (32, 0.001, 0.004, 2, (4, 6), (0.25, 0.0625), 0.5, 0.0),
    "dgxh100_16x8x1": (128, 0.001, 0.004, 4, (16, 32), (0.25, 0.125), 0.5, 0.0),
}
"""Hyperparameters of the published runs, weight decay in PyTorch's units."""


def test_each_submission_has_the_published_hyperparameters() -> None:
    found = {}
    for path in CONFIGS.glob("submission_*.yaml"):
        config = resolve(read_yaml(path))
        schedule, network, optimizer = config.schedule, config.model, config.optimizer
        assert isinstance(schedule, StepDecayConfig) and isinstance(network, ReferenceConfig)
        assert isinstance(optimizer, SGDConfig) and optimizer.momentum == 0.9
        assert config.target_mae == 0.124 and config.loader.batch_size == 1 and config.shuffle
        # Without GPUs it must fail instead of training on CPUs.
        assert config.device == "cuda"
        found[path.stem.removeprefix("submission_")] = (
            config.global_batch, schedule.initial_lr, schedule.base_lr, schedule.warmup_epochs,
            schedule.decay_epochs, schedule.decay_factors, network.dropout, optimizer.weight_decay,
        )  # fmt: skip
    assert found == PUBLISHED


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("config_DGX*.sh")), ids=lambda path: path.stem)
def test_system_configurations_match_their_global_batch(path: Path, checkout: Path) -> None:
    done, _ = sh(
        checkout, f"source configs/{path.name}; echo $DGXNNODES $DGXNGPU $CONFIG_FILE $WALLTIME $DGXSYSTEM"
    )
    nodes, gpus, name, walltime, system = done.stdout.split()
    config = resolve(read_yaml(CONFIGS / f"{name}.yaml"))
    assert config.global_batch == int(nodes) * int(gpus) * config.loader.batch_size
    assert path.stem == f"config_{system}" and re.fullmatch(r"\d\d:\d\d:00", walltime)
    assert config.target_mae == 0.124 and config.shuffle
