"""run.sub and init_datasets.sub on a real SLURM, whose four nodes are this machine."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, Ranks, config_file, environment, write_tiny
from run_artifacts import metrics, same_weights
from slurm_cluster import Cluster, missing_programs

from pipelines.dataset.open import open_folder

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"not installed: {', '.join(missing_programs())}; apt-get install slurm-wlm munge",
    ),
    pytest.mark.timeout(600),
]

TRAIN = "cosmoflow_dali.train"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), 4) as four:
        yield four


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data"), train=12, validation=4, format_name="tfrecord_gzip")


def submit(cluster: Cluster, folder: Path, nodes: int, *arguments: str, **variables: str) -> int:
    """Submit run.sub on `nodes` nodes, with its output in `folder`/job.log; return the job's id."""
    given = {
        "PYTHON": sys.executable,
        "LOGDIR": str(folder / "logs"),
        # Only SLURM resolves the nodes' names.
        "RENDEZVOUS_ADDR": "127.0.0.1",
        "RENDEZVOUS_TIMEOUT": "50",
        "DGXNGPU": "1",
        "CLEAR_CACHES": "0",
        "NCCL_TEST": "0",
        "CHECK_COMPLIANCE": "0",
        "OMP_NUM_THREADS": "1",
    }
    line = [f"--nodes={nodes}", f"--output={folder}/job.log", "run.sub", *arguments]
    return cluster.submit(line, ROOT, **given | variables)


def logs_of(folder: Path, job: int) -> Path:
    return folder / "logs" / str(job)


def lines_of(run: Path) -> list[str]:
    return (run / "mlperf.log").read_text().splitlines()


def train_alone(config: Path, run: Path, seed: int) -> None:
    """Train `config` on two ranks, each alone on its node and so with all of a node's threads."""
    line = [sys.executable, "-m", TRAIN, "--config", str(config), "--run-dir", str(run), "--seed", str(seed)]
    with Ranks(line, range(2), 2, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1") as ranks:
        statuses, words = ranks.end(240)
    assert statuses == {0}, words


def logs_for_a_failure(folder: Path) -> str:
    """Return the ends of all logs of a job, for a failed assertion."""
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in sorted(folder.rglob("*.log")))


def wait_for_checkpoint(run: Path, epoch: int) -> None:
    deadline = time.monotonic() + 120
    while not any((run / "checkpoints").glob(f"epoch{epoch:05d}_*.pt")):
        assert time.monotonic() < deadline, logs_for_a_failure(run.parent)
        time.sleep(0.02)


def test_four_nodes_train_with_every_variable_set(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny.yaml", data, loader={"batch_size": 1}, epochs=2)
    job = submit(
        cluster,
        tmp_path,
        4,
        "--epochs",
        "3",
        CONFIG_FILE=str(config),
        DATADIR=str(data),
        STAGING_DIR=f"{tmp_path}/node.$SLURMD_NODENAME",
        SEED="17",
        NEXP="2",
        DGXNNODES="4",
        DGXSYSTEM="DGXTEST",
        NCCL_TEST="1",
        CHECK_COMPLIANCE="1",
        CLEAR_CACHES="1",
        DROPCACHE_CMD=f"touch {tmp_path}/dropped.$SLURMD_NODENAME",
        BIND="env PLACE={}",
    )
    assert cluster.wait_for(job, seconds=400) == "COMPLETED", logs_for_a_failure(tmp_path)
    said = (tmp_path / "job.log").read_text()
    assert "4 ranks on 4 nodes, cpu" in said and "GB/s" in said
    for number, seed in (("1", 17), ("2", 18)):
        run = logs_of(tmp_path, job) / number
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["ranks"], summary["seed"], summary["epochs"]) == (4, seed, 3)
        events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines_of(run)]
        values = {event["key"]: event["value"] for event in events}
        assert values["number_of_nodes"] == 4 and values["submission_platform"] == "DGXTEST"
        assert values["cache_clear"] is True and "staging_stop" in values
        assert "RESULT,COSMOFLOW_HPC,," in run.with_suffix(".log").read_text()
    assert len(list(tmp_path.glob("dropped.n*"))) == len(list(tmp_path.glob("node.n*"))) == 4
    # The official checker's verdict, printed by cosmoflow_dali.results.
    assert f"{run.name}/mlperf.log" in said


def test_two_instances_of_two_nodes_train_as_two_runs_of_two_ranks(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path / "tiny.yaml", data, loader={"batch_size": 2})
    job = submit(
        cluster, tmp_path, 4, "+instances=2", CONFIG_FILE=str(config), DATADIR=str(data), SEED="31",
        STAGING_DIR=f"{tmp_path}/node.$SLURMD_NODENAME",
    )  # fmt: skip
    assert cluster.wait_for(job, seconds=300) == "COMPLETED", logs_for_a_failure(tmp_path)
    for number, seed in (("1", 31), ("2", 32)):
        lone = tmp_path / f"lone{number}"
        train_alone(config, lone, seed)
        run = logs_of(tmp_path, job) / number
        assert metrics(run) == metrics(lone) and same_weights(run, lone)
        staging = [line for line in lines_of(run) if "staging_st" in line]
        assert len(staging) == 2


def test_failing_instance_does_not_stop_the_other(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny.yaml", data, loader={"batch_size": 2}, epochs=2)
    folder = tmp_path / "logs" / "both"
    folder.mkdir(parents=True)
    (folder / "2").write_text("no folder")
    job = submit(
        cluster, tmp_path, 4, CONFIG_FILE=str(config), NUM_INSTANCES="2", SEED="31", DATESTAMP="both"
    )
    assert cluster.wait_for(job, seconds=300) == "FAILED", logs_for_a_failure(tmp_path)
    assert (folder / "1" / "summary.json").exists()
    assert "1 of 2 runs failed: 2" in (tmp_path / "job.log").read_text()


@pytest.fixture(scope="module")
def long_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration of a few dozen epochs, and its undisturbed run."""
    folder = tmp_path_factory.mktemp("long")
    config = config_file(folder / "long.yaml", data, loader={"batch_size": 2}, epochs=60)
    train_alone(config, folder / "run", 9)
    return config, folder / "run"


def test_stopped_job_is_requeued_and_resumes_exactly(
    cluster: Cluster, long_run: tuple[Path, Path], tmp_path: Path
) -> None:
    config, whole = long_run
    job = submit(cluster, tmp_path, 2, CONFIG_FILE=str(config), SEED="9")
    run = logs_of(tmp_path, job) / "1"
    wait_for_checkpoint(run, 3)
    cluster.run("scancel", "--signal=TERM", str(job))
    deadline = time.monotonic() + 60
    while "the job is requeued" not in (tmp_path / "job.log").read_text():
        assert time.monotonic() < deadline, logs_for_a_failure(tmp_path)
        time.sleep(0.1)
    assert cluster.wait_for(job, seconds=300) == "COMPLETED", logs_for_a_failure(tmp_path)
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", str(job))
    assert metrics(run) == metrics(whole) and same_weights(run, whole)


def test_job_whose_node_goes_down_resumes_exactly(
    cluster: Cluster, long_run: tuple[Path, Path], tmp_path: Path
) -> None:
    config, whole = long_run
    job = submit(cluster, tmp_path, 2, CONFIG_FILE=str(config), SEED="9")
    run = logs_of(tmp_path, job) / "1"
    wait_for_checkpoint(run, 3)
    # The job's second node; the first one has the batch script.
    node = cluster.run("squeue", "-h", "-j", str(job), "-o", "%N")
    victim = next(name for name in reversed(cluster.nodes) if name.removeprefix("n") in node)
    cluster.kill_node(victim)
    try:
        assert cluster.wait_for(job, seconds=300) == "COMPLETED", logs_for_a_failure(tmp_path)
    finally:
        cluster.start_node(victim)
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", str(job))
    assert metrics(run) == metrics(whole) and same_weights(run, whole)


def test_init_datasets_converts_both_splits(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    job = cluster.submit(
        ["--nodes=2", f"--output={tmp_path}/job.log", "init_datasets.sub"],
        ROOT,
        PYTHON=sys.executable,
        DATA_SRC_DIR=str(data),
        DATA_DST_DIR=str(tmp_path / "npy"),
        RENDEZVOUS_ADDR="127.0.0.1",
    )
    assert cluster.wait_for(job, seconds=200) == "COMPLETED", logs_for_a_failure(tmp_path)
    assert [len(open_folder(tmp_path / "npy" / name)) for name in ("train", "validation")] == [12, 4]
    assert (tmp_path / "npy" / "train" / "files_label.lst").exists()


@pytest.mark.parametrize(
    ("number", "wait", "words"),
    [(signal.SIGKILL, 20, "connection lost"), (signal.SIGSTOP, 5, "no heartbeat for 40 s")],
)
def test_killed_or_frozen_rank_under_srun_is_named(
    number: signal.Signals, wait: int, words: str, cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path / "tiny.yaml", data, loader={"batch_size": 1}, epochs=500)
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n"
        f"cd {ROOT}\n"
        f"srun --kill-on-bad-exit=0 --wait={wait} -N4 {sys.executable} -m {TRAIN} "
        f"--config {config} --run-dir {tmp_path}/run\n"
    )
    variables = environment() | {"RENDEZVOUS_ADDR": "127.0.0.1"}
    given = {name: variables[name] for name in ("RENDEZVOUS_ADDR", "OMP_NUM_THREADS")}
    job = cluster.submit(["--nodes=4", f"--output={tmp_path}/job.log", str(script)], tmp_path, **given)
    wait_for_checkpoint(tmp_path / "run", 1)
    cluster.kill_rank(2, number)
    began = time.monotonic()
    assert cluster.wait_for(job, seconds=60) == "FAILED", logs_for_a_failure(tmp_path)
    assert time.monotonic() - began < 60
    said = (tmp_path / "job.log").read_text()
    assert said.count("rank 2 (process ") == 1 and words in said
    shutil.rmtree(tmp_path / "run")


def test_job_with_a_frozen_rank_ends(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny.yaml", data, loader={"batch_size": 1}, epochs=5000)
    job = submit(cluster, tmp_path, 4, CONFIG_FILE=str(config), RENDEZVOUS_TIMEOUT="20")
    run = logs_of(tmp_path, job) / "1"
    wait_for_checkpoint(run, 1)
    cluster.kill_rank(2, signal.SIGSTOP)
    # It is reported after 40 s, and killed 80 s after the others have exited.
    assert cluster.wait_for(job, seconds=180) == "FAILED", logs_for_a_failure(tmp_path)
    said = run.with_suffix(".log").read_text()
    assert said.count("rank 2 (process ") == 1 and "no heartbeat for 40 s" in said
    assert "error: 1 of 1 runs failed: 1" in (tmp_path / "job.log").read_text()


def test_job_stopped_before_training_is_requeued(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny.yaml", data, loader={"batch_size": 2}, epochs=2)
    job = submit(cluster, tmp_path, 2, CONFIG_FILE=str(config))
    deadline = time.monotonic() + 60
    # A signal goes to steps, and is lost before there is one: the batch script, which has a name, is none.
    steps = ["squeue", "--steps", "--noheader", "--jobs", str(job), "--format", "%i"]
    while not re.search(rf"\b{job}\.\d", cluster.run(*steps)):
        assert time.monotonic() < deadline, logs_for_a_failure(tmp_path)
        time.sleep(0.05)
    cluster.run("scancel", "--signal=TERM", str(job))
    assert cluster.wait_for(job, seconds=300) == "COMPLETED", logs_for_a_failure(tmp_path)
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", str(job))
