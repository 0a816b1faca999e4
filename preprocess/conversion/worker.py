"""A process that works for `preprocess.conversion.worker_pool`: one JSON line in, one JSON line out.

It is a program of its own, not a `multiprocessing` child, so that it imports nothing of what its
parent imported (MPI and CUDA must not be started twice) and so that it ends by itself: when the
parent dies, its input ends, and the kernel kills it even in the middle of a write, because the folder
may be another run's by then. The first line names the task and holds its settings and the parent's process
id, each later one is a job; the answer is what the task makes of it, or {"error": ...}.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys

from pipelines.errors import UserError

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def main() -> None:
    """Answer requests until there are no more."""
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    header = json.loads(sys.stdin.readline())
    _die_with(header["parent"])
    task = getattr(importlib.import_module(header["module"]), header["task"])(**header["settings"])
    for line in sys.stdin:
        try:
            answer = {"made": task(json.loads(line))}
        except (OSError, UserError) as error:
            answer = {"error": str(error)}
        try:
            print(json.dumps(answer), file=answers)
        except BrokenPipeError:
            # The parent has gone, so that nobody is left to hear of it.
            os._exit(1)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its `parent` dies; see prctl(2)."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
