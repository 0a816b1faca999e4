"""Atomic writes, and the lock of a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import crc32c
import pytest
from helpers import ROOT, environment, kill, wait_until_gone

from pipelines.io import LOCK_FILE, locked, write_atomically, write_file

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
        write_file(tmp_path / "a", b"inner")
        assert (tmp_path / "a").read_bytes() == b"inner"
        file.write(b"outer")

    write_atomically(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"outer"


@pytest.mark.parametrize("accepted", [0, 1 << 20])
def test_a_large_file_is_written_where_direct_writes_are_refused(
    accepted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, write = os.urandom((3 << 20) + 5), os.write

    def refuse_direct(descriptor: int, data: memoryview) -> int:
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if direct and os.lseek(descriptor, 0, os.SEEK_CUR) >= accepted:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse_direct)
    written = write_file(tmp_path / "a", content[:7], content[7:])
    assert written[1:3] == (len(content), crc32c.crc32c(content))
    assert (tmp_path / "a").read_bytes() == content


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
