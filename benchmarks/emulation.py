"""Accelerator utilisation as MLPerf Storage defines it, for its CosmoFlow workload: accelerators that sleep.

Utilisation is the time that accelerators compute over the time that the run takes. An emulated one
takes a batch from the project's loader and sleeps for as long as the real one computes; whatever it
waits beyond that is the input stage's fault. The workload passes at 70%.
"""

from __future__ import annotations

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
from pipelines.dataset.dataset import SampleDataset
from pipelines.loading.config import LoaderConfig

SECONDS = {"h100": 0.0035, "a100": 0.00551}
"""A step of batch 1 on each, as MLPerf Storage's CosmoFlow workload has it."""

PASSING = 0.7
_LEAD = 32
"""Steps before the clock starts."""


@dataclass(frozen=True, slots=True)
class Utilisation:
    """What a run found.

    accelerators: how many there were. each: the utilisation of each. samples_per_s: of all together.
    cpu_ms: processor time a sample, emulation included.
    """

    accelerators: int
    each: tuple[float, ...]
    samples_per_s: float
    cpu_ms: float

    @property
    def mean(self) -> float:
        """Over the accelerators."""
        return sum(self.each) / len(self.each)


def emulate(
    split: SampleDataset, config: LoaderConfig, seconds: float, *, device: str, accelerators: int, steps: int
) -> Utilisation:
    """Run `steps` steps on each of `accelerators` that take `seconds` a batch, each a process of its own.

    device: "cpu", or "cuda:0": those after the first then take the GPUs that are there, in turn.
    RuntimeError, and all are stopped, where one of them fails or is killed.
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(accelerators), context.SimpleQueue()
    # Every process reads all of the samples: what they read at a time is what counts.
    processes = [
        context.Process(
            name=f"accelerator {number}",
            target=_accelerator,
            args=(split, config, seconds, _place(device, number), steps, barrier, answers),
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
        tuple(steps * seconds / wall for wall, _ in found),
        sum(samples / wall for wall, _ in found),
        1e3 * sum(cpu for _, cpu in found) / (samples * accelerators),
    )


def _place(device: str, number: int) -> str:
    return device if device == "cpu" else f"{device}:{number % torch.cuda.device_count()}"


def _wait_for(processes: Sequence[SpawnProcess]) -> None:
    """Return once all have ended well; one that has not would keep the others waiting for ever."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            if process.exitcode:
                raise RuntimeError(f"emulated {process.name} ended with exit status {process.exitcode}")


def _accelerator(
    split: SampleDataset,
    config: LoaderConfig,
    seconds: float,
    device: str,
    steps: int,
    barrier: Barrier,
    answers: multiprocessing.SimpleQueue[tuple[float, float]],
) -> None:
    with project_loader(split, config, device) as batches:
        for _ in range(_LEAD):
            next(batches)
        barrier.wait()
        start, cpu = time.perf_counter(), harness.cpu_seconds()
        for _ in range(steps):
            next(batches)
            time.sleep(seconds)
        answers.put((time.perf_counter() - start, harness.cpu_seconds() - cpu))
        # Nobody's processors are freed before the last one is done.
        barrier.wait()
