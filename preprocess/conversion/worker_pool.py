"""A pool of worker processes that run a task, and that never outlive their parent.

Workers are spawned, not forked, so that a parent may have MPI, CUDA and threads. They import the task's
module alone and not the parent's main module, which in the trainer is much larger.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.reduction import DupFd
from queue import SimpleQueue
from types import ModuleType
from typing import Any, TypeVar

from pipelines.console import print_line
from pipelines.errors import UserError
from pipelines.filesystem import report_unsupported

Item = TypeVar("Item")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(), from malloc.h of the GNU C library."""

_LARGEST_REUSED = 32 << 20
"""Bytes of an array from which its memory returns to the kernel when it is freed: the library's maximum."""


def run_tasks(
    task: Callable[[Item], Result], items: Iterable[Item], workers: int, lock: int | None = None
) -> Generator[tuple[Item, Result]]:
    """Run `task` on each of `items` in worker processes; yield (item, result) in any order.

    No worker outlives the iterator. Without semaphores, for which /dev/shm must be writable, this process
    runs the tasks.

    Args:
        task: A picklable callable, such as a frozen dataclass at the top of its module.
        items: Picklable; taken when a worker is about to get one, or one item earlier.
        workers: Number of processes, each with one thread for arithmetic.
        lock: Descriptor of a locked file. Workers inherit it, so that a folder stays locked until the last of
            them has ended, even where the parent was killed.

    Raises:
        UserError: A worker process died. Errors of `task` are raised as they are.
    """
    try:
        pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            _start_worker,
            (os.getpid(), _InheritedDescriptor(lock)),
        )
    except OSError as error:
        report_unsupported("/dev/shm", "semaphores", error, "one process does all the work")
        for item in items:
            yield item, task(item)
        return
    others = set(multiprocessing.active_children())
    running: dict[Future[Result], Item] = {}
    finished: SimpleQueue[Future[Result]] = SimpleQueue()
    remaining = iter(items)

    def submit(count: int) -> None:
        for item in islice(remaining, count):
            with _spawn_settings():
                future = pool.submit(task, item)
            running[future] = item
            future.add_done_callback(finished.put)

    try:
        submit(2 * workers)  # A worker does not wait for this process between two items.
        while running:
            future = finished.get()
            yield running.pop(future), future.result()
            submit(1)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, probably for lack of memory; use fewer with --workers, and run the same "
            "command again: it resumes"
        ) from error
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        pool.shutdown(cancel_futures=True)


def fit_workers(workers: int, each: int, available: int, *, shown: bool) -> int:
    """Return `workers`, or as many fewer as fit into the memory, but at least one.

    Args:
        workers: Number of processes that are wanted.
        each: Bytes of memory that one of them takes, at most.
        available: Bytes of memory that they may take.
        shown: Print a line if they do not fit.
    """
    if workers * each <= available:
        return workers
    fitting = max(1, available // each)
    if shown:
        sizes = f"each needs {each / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available"
        print_line(f"{fitting} of {workers} worker processes are started: {sizes}", sys.stderr)
    return fitting


class _InheritedDescriptor:
    """A file descriptor that stays open in a spawned process."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[type[_InheritedDescriptor], tuple[Any]]:
        return type(self), (None if self._descriptor is None else DupFd(self._descriptor),)


@contextlib.contextmanager
def _spawn_settings() -> Iterator[None]:
    """Have a process that is spawned here skip the main module and ignore Ctrl-C, which is for the parent."""
    # The child inherits the mask, which holds before its first line of Python.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(parent: int, _lock: _InheritedDescriptor) -> None:
    """Have the kernel kill this process when its `parent` dies; see prctl(2).

    Even in the middle of a write: the folder may belong to another run by then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        os._exit(1)
    # The parent warns of the file system, once for all workers.
    logging.getLogger("pipelines").setLevel(logging.ERROR)
    # Keep freed memory for the next sample, for which the kernel would have to clear the pages again.
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_REUSED)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
    # Before NumPy is imported with the first task.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
