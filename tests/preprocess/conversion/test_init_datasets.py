"""The SLURM script with a replacement of srun that starts a rank for each of two nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT, environment, write_tiny

from pipelines.dataset.open import open_folder

SRUN = """#!/bin/bash
echo "$@" >> "$SRUN_LOG"
while [[ "$1" == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE='1(x2)' "$@" &
    ranks+=($!)
done
status=0
for rank in "${ranks[@]}"; do wait "$rank" || status=1; done
exit $status
"""


def submit(tmp_path: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with `options` as sbatch would, from a copy, with `variables` exported."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "srun").write_text(SRUN)
    (tools / "srun").chmod(0o755)
    script = tmp_path / "slurm_script"
    script.write_bytes((ROOT / "init_datasets.sub").read_bytes())
    given = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SRUN_LOG": str(tmp_path / "srun.log"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "PYTHON": sys.executable,
    }
    line, told = ["bash", str(script), *options], environment() | given | variables
    return subprocess.run(line, env=told, capture_output=True, text=True, timeout=240)


def test_both_splits_with_their_lists(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "src", train=5, validation=2, format_name="tfrecord_gzip")
    done = submit(tmp_path, DATA_SRC_DIR=str(data), DATA_DST_DIR=str(tmp_path / "dst"))
    assert done.returncode == 0, done.stderr
    for split, count in (("train", 5), ("validation", 2)):
        assert len(open_folder(tmp_path / "dst" / split)) == count
        assert len((tmp_path / "dst" / split / "files_label.lst").read_text().splitlines()) == count
    asked = (tmp_path / "srun.log").read_text()
    assert "--container" not in asked and "--mpi=none" in asked


def test_container_format_and_options(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "src", train=4, validation=1, format_name="tfrecord_gzip")
    target = tmp_path / "dst"
    variables = {"DATA_SRC_DIR": str(data), "DATA_DST_DIR": str(target), "DATA_FORMAT": "packed"}
    done = submit(tmp_path, "--samples-per-shard", "2", **variables, CONT="image")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "srun.log").read_text()
    assert "--container-image=image" in asked and f"{data}:{data}:ro,{target}:{target}" in asked
    dataset = open_folder(target / "train")
    assert dataset.format_name == "packed" and len(dataset.entry_names) == 2


def test_missing_variable_is_named(tmp_path: Path) -> None:
    variables = {"DATA_SRC_DIR": str(tmp_path), "DATA_DST_DIR": str(tmp_path / "dst")}
    for missing in variables:
        given = {name: value for name, value in variables.items() if name != missing}
        done = submit(tmp_path, **given)
        assert done.returncode != 0 and missing in done.stderr


def test_path_that_cannot_be_mounted_is_named(tmp_path: Path) -> None:
    given = {"DATA_SRC_DIR": str(tmp_path), "DATA_DST_DIR": str(tmp_path / "my data"), "CONT": "image"}
    done = submit(tmp_path, **given)
    assert done.returncode == 1 and done.stderr.startswith(f"error: DATA_DST_DIR {tmp_path}/my data: ")
    assert not (tmp_path / "my data").exists()


def test_failed_rank_fails_the_job(tmp_path: Path) -> None:
    done = submit(tmp_path, DATA_SRC_DIR=str(tmp_path / "none"), DATA_DST_DIR=str(tmp_path / "dst"))
    assert done.returncode != 0 and "cannot be listed" in done.stderr
