"""Accelerator utilisation of MLPerf Storage's CosmoFlow workload, with emulated accelerators.

Utilisation is the compute time of the accelerators divided by the run time. An emulated accelerator takes a
batch from the project's loader and sleeps for the compute time of a real one; any additional time is caused
by the input stage. The workload requires 70%.

By MLPerf Storage's formula (`compute_metrics_train` in DLIO's statscounter.py) the first step is left out,
and the compute time is the measured one, so that a sleep that takes too long counts as computing. A result of
it is unofficial: it was not made by DLIO's program, and not submitted.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Barrier

import torch

from benchmarks import harness
from benchmarks.candidates import project_loader
from cosmoflow_dali.compute.torch_setup import tune_malloc
from pipelines.dataset.dataset import SampleDataset
from pipelines.loading.config import LoaderConfig

SECONDS = {"h100": 0.0035, "a100": 0.00551}
"""Compute time of a step of batch 1 in MLPerf Storage's CosmoFlow workload."""

_PASSING = 0.7
_LEAD = 32
"""Warm-up steps."""

_PR_SET_TIMERSLACK = 29
"""Option of prctl(), from linux/prctl.h; its value is in ns."""


@dataclass(frozen=True, slots=True)
class Utilisation:
    """Figures of a run.

    Attributes:
        accelerators: Number of accelerators.
        each: Utilisation of each, with the compute time that was asked for.
        by_formula: Utilisation of each by MLPerf Storage's formula; unofficial.
        samples_per_s: Of all together.
        cpu_ms: CPU time per sample in ms, including the emulation.
    """

    accelerators: int
    each: tuple[float, ...]
    by_formula: tuple[float, ...]
    samples_per_s: float
    cpu_ms: float

    @property
    def mean(self) -> float:
        """Mean utilisation."""
        return sum(self.each) / len(self.each)


def parse_seconds(text: str) -> float:
    """Return the compute time of a step in seconds: a number, or that of an accelerator by its name."""
    seconds = SECONDS.get(text) or float(text)
    if not 0.0 < seconds < 3600.0:
        raise argparse.ArgumentTypeError(f"{text} seconds: must be above 0 and below an hour")
    return seconds


def emulate(
    split: SampleDataset, config: LoaderConfig, seconds: float, *, device: str, accelerators: int, steps: int
) -> Utilisation:
    """Run `steps` steps of `seconds` each on `accelerators` emulated accelerators, in one process each.

    Args:
        device: "cpu" or "cuda:0"; further accelerators use the available GPUs in turn.

    Raises:
        RuntimeError: A process failed or was killed; all are stopped.
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(accelerators), context.SimpleQueue()
    # Each process reads all samples: the load depends on simultaneous reads only.
    processes = [
        context.Process(
            name=f"accelerator {number}",
            target=_accelerator,
            args=(split, config, seconds, _device_of(device, number), steps, barrier, answers),
        )
        for number in range(accelerators)
    ]
    for process in processes:
        process.start()
    try:
        _wait_for(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    found = [answers.get() for _ in processes]
    samples = steps * config.batch_size
    return Utilisation(
        accelerators,
        tuple(steps * seconds / wall for wall, *_ in found),
        tuple(utilisation for _, _, utilisation in found),
        sum(samples / wall for wall, *_ in found),
        1e3 * sum(cpu for _, cpu, _ in found) / (samples * accelerators),
    )


def show_utilisation(found: dict[str, Utilisation], seconds: float) -> None:
    """Print the utilisation of the emulated accelerators."""
    for name, one in found.items():
        verdict = "passes" if min(one.each) >= _PASSING else "does not pass"
        each = f" ({min(one.each):.1%} to {max(one.each):.1%})" if one.accelerators > 1 else ""
        print(
            f"{name:14} {one.accelerators} x {1e3 * seconds:g} ms a step: utilisation {one.mean:.1%}{each}, "
            f"{verdict} at {_PASSING:.0%}; {one.samples_per_s:.0f} samples/s, {one.cpu_ms:.1f} ms CPU a "
            f"sample; {min(one.by_formula):.1%} by MLPerf Storage's formula (unofficial)"
        )


def _device_of(device: str, number: int) -> str:
    return device if device == "cpu" else f"cuda:{number % torch.cuda.device_count()}"


def _wait_for(processes: Sequence[SpawnProcess]) -> None:
    """Wait until all have ended; raise for one that failed, because the others would wait for it forever."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            if process.exitcode:
                raise RuntimeError(f"emulated {process.name} failed with exit status {process.exitcode}")


def _sleep_precisely() -> None:
    """Let the kernel end sleeps when they should, not up to 50 us later."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1))


def _accelerator(
    split: SampleDataset,
    config: LoaderConfig,
    seconds: float,
    device: str,
    steps: int,
    barrier: Barrier,
    answers: multiprocessing.SimpleQueue[tuple[float, float, float]],
) -> None:
    _sleep_precisely()
    tune_malloc()
    with project_loader(split, config, device) as batches:
        for _ in range(_LEAD):
            next(batches)
        barrier.wait()
        cpu, ends, computing = harness.cpu_seconds(), [time.perf_counter()], []
        for _ in range(steps):
            next(batches)
            start = time.perf_counter()
            time.sleep(seconds)
            ends.append(time.perf_counter())
            computing.append(ends[-1] - start)
        by_formula = sum(computing[1:]) / (ends[-1] - ends[1])
        answers.put((ends[-1] - ends[0], harness.cpu_seconds() - cpu, by_formula))
        # All keep their load until the last one is done.
        barrier.wait()
