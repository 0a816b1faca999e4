"""Files that are whole or not there, and one writer at a time in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
from helpers import ROOT, environment

from pipelines.files import LOCK, locked, write_atomically, write_chunks

COUNT = """
import sys
from pathlib import Path
from pipelines.files import locked

folder = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with locked(folder, lambda: None):
        number = int((folder / "number").read_text())
        (folder / "number").write_text(str(number + 1))
"""


def refuse() -> None:
    raise InterruptedError("held")


def test_writers_take_turns(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    line = [sys.executable, "-c", COUNT, str(tmp_path), "300"]
    writers = [subprocess.Popen(line, cwd=ROOT, env=environment()) for _ in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    assert (tmp_path / "number").read_text() == "1200"
    assert not (tmp_path / LOCK).exists()


def test_the_last_of_two_writers_of_one_file_wins(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        write_chunks(tmp_path / "a", b"inner")
        assert (tmp_path / "a").read_bytes() == b"inner"
        file.write(b"outer")

    write_atomically(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"outer"


def test_the_right_goes_with_the_descriptor_and_a_file_left_over_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()  # As a writer that was killed leaves it.
    with locked(tmp_path, refuse) as right:
        kept = os.dup(right)
        with pytest.raises(InterruptedError), locked(tmp_path, refuse):
            pass
        # The file is the holder's to remove, not that of who was refused.
        assert (tmp_path / LOCK).exists()
    os.close(kept)
    with locked(tmp_path, refuse):
        pass
    assert not list(tmp_path.iterdir())
