"""Atomic writes, and the lock of a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
from helpers import ROOT, environment, kill, wait_until_gone

from pipelines.io import LOCK_FILE, locked, write_atomically, write_chunks

COUNT = """
import sys
from pathlib import Path
from pipelines.io import locked

folder = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with locked(folder, lambda: None):
        number = int((folder / "number").read_text())
        (folder / "number").write_text(str(number + 1))
"""


HOLD = """
import subprocess, sys, time
from pathlib import Path
from pipelines.io import locked

with locked(Path(sys.argv[1]), lambda: None) as descriptor:
    child = subprocess.Popen(["sleep", "600"], pass_fds=[descriptor], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(600)
"""


def refuse() -> None:
    raise InterruptedError("held")


def test_the_lock_excludes_other_writers(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    line = [sys.executable, "-c", COUNT, str(tmp_path), "300"]
    writers = [subprocess.Popen(line, cwd=ROOT, env=environment()) for _ in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    assert (tmp_path / "number").read_text() == "1200"


def test_the_last_writer_of_a_file_wins(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        write_chunks(tmp_path / "a", b"inner")
        assert (tmp_path / "a").read_bytes() == b"inner"
        file.write(b"outer")

    write_atomically(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"outer"


def test_a_child_with_the_descriptor_keeps_the_lock(tmp_path: Path) -> None:
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        holder.kill()
    with pytest.raises(InterruptedError), locked(tmp_path, refuse):
        pass
    kill([child])
    wait_until_gone([child])
    # The leftover file is not locked.
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path, refuse):
        pass


def test_the_lock_file_has_the_permissions_of_the_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    with locked(tmp_path, refuse):
        assert (tmp_path / LOCK_FILE).stat().st_mode & 0o777 == 0o664
