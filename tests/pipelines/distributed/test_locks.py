"""Locks of folders: with flock, where it is refused, and where it is one node's own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
from helpers import ROOT, environment, kill, wait_until_gone

from pipelines.distributed import locks
from pipelines.distributed.locks import LOCK_FILE, locked

COUNT = """
import sys
from pathlib import Path
from pipelines.distributed.locks import locked

folder = Path(sys.argv[1])
for _ in range(int(sys.argv[2])):
    with locked(folder, lambda holder: None):
        number = int((folder / "number").read_text())
        (folder / "number").write_text(str(number + 1))
"""


HOLD = """
import subprocess, sys, time
from pathlib import Path
from pipelines.distributed.locks import locked

with locked(Path(sys.argv[1]), lambda holder: None) as descriptor:
    child = subprocess.Popen(["sleep", "600"], pass_fds=[descriptor], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(600)
"""


class HeldError(Exception):
    """The lock is held by the process that the text describes."""


def refuse(holder: str) -> NoReturn:
    raise HeldError(holder)


def holder_of(folder: Path, **options: float) -> str:
    """Return the description of the process that holds the lock of `folder`."""
    with pytest.raises(HeldError) as held, locked(folder, refuse, **options):
        pass
    return str(held.value)


@pytest.fixture(params=[errno.ENOLCK, 524, "one node"])
def unreliable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have flock be refused, or exclude nobody, as it does for another node where it is node-local."""

    def flock(*_: object) -> None:
        if request.param != "one node":
            raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_SETTLING", 0.2)


def write_record(folder: Path, **changes: Any) -> Path:
    """Leave the lock of `folder` with a record of this process with `changes`."""
    with locked(folder, refuse):
        content = (folder / LOCK_FILE).read_bytes()
    (folder / LOCK_FILE).write_bytes(json.dumps(json.loads(content) | changes).ljust(512).encode())
    return folder / LOCK_FILE


@contextlib.contextmanager
def heartbeats(path: Path) -> Iterator[None]:
    """Change the file `path` as a process on another node does."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    with ThreadPoolExecutor(1) as other:
        beating = other.submit(beat)
        yield
        ended.set()
        beating.result()


def test_the_lock_excludes_other_writers(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    line = [sys.executable, "-c", COUNT, str(tmp_path), "100"]
    writers = [subprocess.Popen(line, cwd=ROOT, env=environment()) for _ in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    assert (tmp_path / "number").read_text() == "400"


def test_the_holder_is_named_while_it_holds_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path, refuse):
        description = holder_of(tmp_path)
        assert description.startswith(f"process {os.getpid()} on {os.uname().nodename} since ")
        assert holder_of(tmp_path, grace=0.1) == description
    assert (tmp_path / LOCK_FILE).read_bytes() == b""
    with locked(tmp_path, refuse):
        pass


def test_a_child_with_the_descriptor_keeps_the_lock(tmp_path: Path) -> None:
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        holder.kill()
    holder_of(tmp_path)
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


@pytest.mark.usefixtures("unreliable")
def test_the_record_excludes_others_where_flock_does_not(tmp_path: Path) -> None:
    with locked(tmp_path, refuse):
        assert f"process {os.getpid()} " in holder_of(tmp_path)
    with locked(tmp_path, refuse):
        pass


def test_one_of_several_gets_the_lock_of_a_dead_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreliable: None
) -> None:
    write_record(tmp_path, started=1)
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    start, finish = threading.Barrier(5), threading.Barrier(5)
    alive: list[bool] = []

    def contend() -> None:
        start.wait()
        try:
            with locked(tmp_path, refuse):
                finish.wait()
                # A heartbeat reads the record again.
                time.sleep(0.4)
            alive.append(True)
        except HeldError:
            finish.wait()

    with ThreadPoolExecutor(5) as pool:
        for each in [pool.submit(contend) for _ in range(5)]:
            each.result()
    assert len(alive) - len(exits) == 1


@pytest.mark.usefixtures("unreliable")
def test_an_ended_process_of_this_system_is_replaced_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        started = locks._start(process.pid)
        write_record(tmp_path, pid=process.pid, started=started)
        assert f"process {process.pid} " in holder_of(tmp_path)
        process.kill()
        while (Path("/proc") / str(process.pid) / "stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        # It has ended, and its parent has not asked for its status.
        with locked(tmp_path, refuse):
            pass
    # Its ID is another process's by now.
    write_record(tmp_path, pid=os.getpid(), started=started)
    with locked(tmp_path, refuse):
        pass


def test_a_copy_of_a_locked_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", refuse):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with locked(tmp_path / "copy", refuse):
            for name in ("run", "copy"):
                assert f"process {os.getpid()} " in holder_of(tmp_path / name)


@pytest.mark.parametrize("content", ["another system", "no record"])
def test_a_process_of_another_system_is_replaced_after_a_time_without_heartbeats(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "STALE_TIMEOUT", 0.4)
    path = write_record(tmp_path, system="another", host="n7")
    if content == "no record":
        path.write_bytes(b"{cut off")
    with heartbeats(path):
        # flock succeeds: on this node nobody else has it.
        holder_of(tmp_path)
    start = time.monotonic()
    with locked(tmp_path, refuse):
        assert time.monotonic() - start >= 0.4
    assert ("n7" if content == "another system" else "another process") in caplog.text


def test_a_holder_that_was_replaced_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "_SETTLING", 0.05)
    ended = threading.Event()

    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    other = write_record(tmp_path, host="n7").read_bytes()
    (tmp_path / LOCK_FILE).write_bytes(b"")
    with locked(tmp_path, refuse):
        (tmp_path / LOCK_FILE).write_bytes(other)
        assert ended.wait(10)
    assert f"error: {tmp_path}: was taken over by process {os.getpid()} on n7" in capsys.readouterr().err
