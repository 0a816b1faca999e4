"""Programs started in a folder that has modules of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import DATA, environment

DECOYS = ("yaml.py", "numpy.py", "h5py/__init__.py", "pipelines/__init__.py", "configs/default.yaml")
FOLDERS = ("cosmoflow_dali/notes.txt", "preprocess/notes.txt", "pipelines.dataset/notes.txt")


def run_in(folder: Path, decoys: Sequence[str], line: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """Run `python line...` in `folder`, which gets empty files of the names `decoys`."""
    for name in decoys:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return subprocess.run(
        [sys.executable, *map(str, line)],
        cwd=folder,
        env={name: value for name, value in environment().items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("options", [[], ["-P"]] if sys.version_info >= (3, 11) else [[]])
def test_modules_of_the_working_folder_are_not_taken(options: list[str], tmp_path: Path) -> None:
    decoys = (*DECOYS, *FOLDERS, "preprocess.py")
    for program, others in (("cosmoflow_dali.results", decoys), ("preprocess.download", (*DECOYS, *FOLDERS))):
        folder = tmp_path / program
        folder.mkdir()
        done = run_in(folder, others, [*options, "-m", program, "--help"])
        assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_other_programs_keep_their_working_folder(tmp_path: Path) -> None:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text("import cosmoflow_dali, preprocess")
    (tmp_path / "tool" / "run.py").write_text("import mine, sys; print(sys.path[0])")
    done = run_in(tmp_path, ["mine.py"], ["-m", "tool.run"])
    assert (done.returncode, done.stdout) == (0, f"{os.path.realpath(tmp_path)}\n"), done.stderr


@pytest.mark.slow
def test_workers_do_not_take_modules_of_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(DATA / "tfrecord_gzip")
    line = ["-m", "preprocess.convert", "-i", "data", "-o", "made", "--to", "npy", "--workers", "2"]
    # Workers import these before they receive the path.
    stdlib = ("pickle.py", "socket.py", "random.py") if sys.version_info >= (3, 11) else ()
    done = run_in(tmp_path, (*DECOYS, *FOLDERS), line)
    assert done.returncode == 0, done.stderr
    done = run_in(tmp_path, stdlib, [*line[:5], "again", *line[6:]])
    assert done.returncode == 0, done.stderr
