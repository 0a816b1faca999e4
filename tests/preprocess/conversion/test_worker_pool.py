"""Worker processes: their errors, and their end together with their parent."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from helpers import ROOT, environment, kill, started_by, wait_until_gone

from pipelines import filesystem
from pipelines.distributed.locks import LOCK_FILE
from pipelines.errors import DataError, UserError
from preprocess.conversion.worker_pool import fit_workers, run_tasks

PARENT = """
import sys
from pathlib import Path
from pipelines.distributed.locks import locked
from preprocess.conversion.worker_pool import run_tasks

with locked(Path(sys.argv[1]), lambda holder: None) as lock:
    list(run_tasks(exec, [sys.argv[2]], 1, lock))
"""


def test_results_come_with_their_items() -> None:
    assert sorted(run_tasks(abs, range(-9, 0), 2)) == [(-number, number) for number in range(9, 0, -1)]


def test_errors_of_a_task_are_raised_as_they_are() -> None:
    with pytest.raises(FileNotFoundError):
        list(run_tasks(os.listdir, ["/none"], 1))
    code = "from pipelines.errors import DataError; raise DataError('/a', 'is bad', 'fix it')"
    with pytest.raises(DataError) as error:
        list(run_tasks(exec, [code], 1))
    assert error.value.path == "/a"


def test_a_worker_reuses_the_memory_of_the_sample_before() -> None:
    # 18,000 pages, then the page faults of the process.
    code = "len([b'x' * (8 << 20) for _ in range(9)]) * __import__('resource').getrusage(0).ru_minflt"
    first, *_, last = (faults // 9 for _, faults in run_tasks(eval, [code] * 4, 1))
    assert last - first < 1000


def test_worker_that_is_killed_is_one_error() -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        list(run_tasks(exec, ["import os; os.kill(os.getpid(), 9)", *["import time; time.sleep(60)"] * 3], 2))
    assert "worker process died" in str(error.value) and time.monotonic() - start < 30


def test_no_worker_outlives_the_iterator(tmp_path: Path) -> None:
    code = f"import os, pathlib, time; pathlib.Path('{tmp_path}', str(os.getpid())).touch(); time.sleep(60)"
    results = run_tasks(exec, ["pass", code, code], 2)
    next(results)
    while not (started := [int(path.name) for path in tmp_path.iterdir()]):
        time.sleep(0.01)
    results.close()
    wait_until_gone(started)


def test_workers_have_one_thread_and_do_not_take_part_in_ctrl_c() -> None:
    code = """
import os, signal, sys
assert os.environ["OMP_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "1"
assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
assert not {"numpy", "torch", "pytest"} & set(sys.modules)
"""
    list(run_tasks(exec, [code], 1))


def test_worker_keeps_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    # One that the kernel cannot end at once, as in a write to a file system that hangs.
    code = f"""
import ctypes, time
ctypes.CDLL(None).prctl(1, 0)
open({str(tmp_path / "started")!r}, "w").close()
time.sleep(60)
"""
    line = [sys.executable, "-c", PARENT, str(tmp_path), code]
    with subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as parent:
        while not (tmp_path / "started").exists():
            assert parent.poll() is None
            time.sleep(0.01)
        workers = started_by(parent.pid)
        parent.send_signal(signal.SIGKILL)
    with open(tmp_path / LOCK_FILE) as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        kill(workers)
        wait_until_gone(workers)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOENT, errno.EACCES, errno.ENOSYS])
def test_without_semaphores_one_process_does_the_work(
    number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = OSError(number, os.strerror(number))
    monkeypatch.setattr("_multiprocessing.SemLock", mock.Mock(side_effect=refusal))
    monkeypatch.setattr(filesystem, "_reported", set())
    assert list(run_tasks(abs, iter([-1, 2, -3]), 4)) == [(-1, 1), (2, 2), (-3, 3)]
    assert caplog.text.count("/dev/shm") == 1 and os.strerror(number) in caplog.text


def test_no_more_workers_than_fit_into_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_workers(8, 10, 80, shown=True) == 8
    assert fit_workers(8, 10, 79, shown=False) == 7
    assert capsys.readouterr().err == ""
    # One that does not fit is tried: the estimate may be too high.
    assert fit_workers(8, 3 * 10**9, 10**9, shown=True) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 8" in line and "3.0 GB" in line and "1.0 GB" in line
