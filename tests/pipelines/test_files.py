"""One writer at a time in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment

from pipelines.files import LOCK, locked

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
