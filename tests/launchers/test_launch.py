"""`make train NODES=...` with SLURM, a host file, and on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import ROOT, config_file, environment, write_tiny

from cosmoflow_dali import launch

SBATCH = """#!/bin/bash
printf '%s\\n' "$@" "nodes=$DGXNNODES" "in=$PWD" >> "$SBATCH_LOG"
[[ -n "${REFUSED:-}" ]] && { echo "sbatch: error: no such partition" >&2; exit 1; }
echo "4711;cluster"
"""


def make_train(tmp_path: Path, *variables: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `make train` with a path that has a fake sbatch and what make needs."""
    given = {"PATH": f"{tmp_path}:{Path('/usr/bin')}:/bin", "SBATCH_LOG": str(tmp_path / "sbatch.log")}
    return subprocess.run(
        ["make", "--silent", "--old-file", ".venv/.done", "train", *variables],
        cwd=ROOT,
        env=environment() | given | environ,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture
def sbatch(tmp_path: Path) -> Path:
    program = tmp_path / "sbatch"
    program.write_text(SBATCH)
    program.chmod(0o755)
    return tmp_path


def test_job_is_submitted_and_described(sbatch: Path) -> None:
    done = make_train(sbatch, "NODES=16", "ARGS=--epochs 2", WALLTIME="00:10:00", DGXNODES="3")
    assert done.returncode == 0, done.stderr
    asked = (sbatch / "sbatch.log").read_text().splitlines()
    assert asked == [
        "--parsable", "--nodes=16", "--output=slurm-%j.out", "--time=00:10:00", f"{ROOT}/run.sub",
        "--epochs", "2", "nodes=16", f"in={ROOT}",
    ]  # fmt: skip
    for words in ("job 4711 on 16 nodes", "slurm-4711.out", "scancel --signal=TERM 4711", "scancel 4711"):
        assert words in done.stdout


def test_failed_submission_is_an_error(sbatch: Path) -> None:
    done = make_train(sbatch, "NODES=2", REFUSED="1")
    assert (
        done.returncode != 0
        and "no such partition" in done.stderr
        and "sbatch failed with status 1" in done.stderr
    )


def test_names_of_a_submission_are_those_of_the_working_folder(
    sbatch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sbatch)
    for name, value in (("PATH", f"{sbatch}:/usr/bin:/bin"), ("SBATCH_LOG", "asked"), ("LOGDIR", "logs")):
        monkeypatch.setenv(name, value)
    assert launch.main(["--nodes", "2", "--", "--data-dir", "data"]) == 0
    asked = (sbatch / "asked").read_text().splitlines()
    assert asked[-5:] == [f"{ROOT}/run.sub", "--data-dir", "data", "nodes=2", f"in={sbatch}"]
    assert f"{sbatch}/slurm-4711.out {sbatch}/logs/4711/1.log" in capsys.readouterr().out


@pytest.mark.skipif(
    any((Path(folder) / "sbatch").exists() for folder in ("/usr/bin", "/bin")),
    reason="SLURM is installed here",
)
def test_without_slurm_the_alternatives_are_named(tmp_path: Path) -> None:
    done = make_train(tmp_path, "NODES=2")
    assert done.returncode != 0
    assert "sbatch was not found" in done.stderr and "HOSTFILE" in done.stderr and "LOCAL=1" in done.stderr


def test_invalid_variables_are_refused(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# the first rack\na slots=8\nb slots=8\n")
    for variables, message in (
        (["NODES=0"], "--nodes = 0"),
        (["NODES=3", f"HOSTFILE={hosts}"], "--nodes = 3"),
        (["NODES=2", "HOSTFILE=/none/such"], "/none/such"),
        (["NODES=2", f"HOSTFILE={hosts}", "LOCAL=1"], "--hostfile = "),
    ):
        done = make_train(tmp_path, *variables)
        assert done.returncode != 0 and done.stderr.startswith("error: ") and message in done.stderr


def test_first_hosts_get_a_rank_per_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Sequence[str]] = []

    def call(line: Sequence[str]) -> int:
        lines.append(line)
        return 7

    hosts = tmp_path / "hosts"
    hosts.write_text("# the first rack\na slots=8\n\nb slots=8\nc slots=8\n")
    monkeypatch.setattr(launch, "_call", call)
    for name, value in (
        ("DGXNGPU", "4"),
        ("NCCL_DEBUG", "WARN"),
        ("RENDEZVOUS_TIMEOUT", "9"),
        ("AWS_SECRET_ACCESS_KEY", "sesame"),
        ("OTHER", "x"),
    ):
        monkeypatch.setenv(name, value)
    assert launch.main(["--nodes", "2", "--hostfile", str(hosts), "--", "--epochs", "3"]) == 7
    ((program, *line),) = lines
    assert Path(program).name == "mpirun"
    assert line[:8] == ["-n", "8", "--host", "a:4,b:4", "--map-by", "ppr:4:node", "--bind-to", "none"]
    forwarded = {name for flag, name in pairwise(line) if flag == "-x"}
    assert {"NCCL_DEBUG", "RENDEZVOUS_TIMEOUT", "PATH"} <= forwarded and "OTHER" not in forwarded
    # Where data lie in an object store. The line, which is printed, has no values.
    assert "AWS_SECRET_ACCESS_KEY" in forwarded and not any("sesame" in part for part in line)
    assert line[-5:] == [sys.executable, "-m", "cosmoflow_dali.train", "--epochs", "3"]


@pytest.mark.parametrize("variable", ["LOCAL=1", "HOSTFILE={hosts}"])
def test_make_train_starts_ranks(variable: str, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=4, validation=2)
    config = config_file(tmp_path / "config.yaml", data, loader={"batch_size": 1}, epochs=1)
    hosts = tmp_path / "hosts"
    # A single host with two ranks needs no ssh.
    hosts.write_text("localhost\n")
    nodes = "2" if variable == "LOCAL=1" else "1"
    arguments = f"ARGS=--config {config} --run-dir {tmp_path}/run"
    done = make_train(
        tmp_path,
        f"NODES={nodes}",
        variable.format(hosts=hosts),
        arguments,
        DGXNGPU="2",
        PATH=os.environ["PATH"],
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2
