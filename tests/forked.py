"""Python programs in processes forked from a server that has imported torch and DALI already.

Starting an interpreter and importing torch costs more than most tests do. A forked program starts in
milliseconds; all else about it is a process: environment, output, signals, exit status.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

from pipelines.console import prepare_program

_context = multiprocessing.get_context("forkserver")
# None of these imports starts a thread, which a fork would lose.
_context.set_forkserver_preload(
    [
        "forked",
        "torch.distributed",
        "nvidia.dali",
        "cosmoflow_dali.train",
        "cosmoflow_dali.reporting.html_report",
        "preprocess.convert",
        "preprocess.stage",
    ]
)


class Forked:
    """A running `python -m module arguments...` or `python -c program`, with the interface of `Popen`."""

    def __init__(self, line: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> None:
        """Start the command `line`, whose first word is ignored: this interpreter runs it."""
        folder = tempfile.mkdtemp(prefix="forked")
        weakref.finalize(self, shutil.rmtree, folder)
        self._outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        arguments = (list(line[1:]), str(cwd), dict(env), [str(path) for path in self._outputs])
        self._process = _context.Process(target=_run, args=arguments)
        # The first start is also the server's, whose environment decides torch's number of threads.
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "0"}):
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while the program runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked program", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what the program has written to stdout and stderr."""
        self.wait(timeout)
        out, err = map(_text, self._outputs)
        return out, err

    def printed(self) -> str:
        """Return what the program has written to stdout so far."""
        return _text(self._outputs[0])

    def send_signal(self, number: int) -> None:
        """Send the signal `number` to the program if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _run(arguments: Sequence[str], cwd: str, environ: Mapping[str, str], outputs: Sequence[str]) -> None:
    """Run a command line in this process as the interpreter would."""
    for path, descriptor in zip(outputs, (1, 2), strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.path.insert(0, cwd)
    option, program, *rest = arguments
    sys.argv = [program if option == "-m" else option, *rest]
    if option == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        return
    argv, sys.argv = sys.argv, ["-m"]
    prepare_program()
    sys.argv = argv
    with warnings.catch_warnings():
        # The module may have been imported already, which is harmless here.
        warnings.simplefilter("ignore", RuntimeWarning)
        runpy.run_module(program, run_name="__main__", alter_sys=True)
