"""Fill a folder with samples: share out the work, keep what is there, collect the faults."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.dist import World, report_errors
from pipelines.errors import AccessError, ConfigError
from pipelines.files import locked
from pipelines.manifest import Entry
from pipelines.sample import SampleSpec
from preprocess.output import Journal, begin, finish
from preprocess.progress import progress
from preprocess.workforce import Task, run_jobs

_PROCESSES_A_CORE = 2
"""While one waits for the disk, another inflates."""


class Job(NamedTuple):
    """What the task is told of a source, as JSON can hold it, and the stems of the entries it becomes."""

    source: Any
    makes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Order:
    """What a folder shall hold.

    target: the folder.
    form: the format, a key of FORMATS.
    spec: the shape of every sample.
    jobs: what is made at a time.
    """

    target: Path
    form: str
    spec: SampleSpec
    jobs: Sequence[Job]


@dataclass(frozen=True, slots=True)
class Produced:
    """What became of orders: samples made, samples that were there, and the faults of sources."""

    made: int = 0
    kept: int = 0
    faults: tuple[str, ...] = ()

    def __add__(self, other: Produced) -> Produced:
        return Produced(self.made + other.made, self.kept + other.kept, self.faults + other.faults)


def produce(
    order: Order, task: Task, *, world: World, workers: int, unit: str, shown: bool = False
) -> Produced:
    """Make what is missing of `order`, with the ranks of `world`.

    Each rank has `workers` processes do its share. `task` is asked for a source at a time, as
    `make_entries` wants to be called. The manifest and the list files are written if every source
    was sound; one that is damaged keeps none of the others from being used. Raises a UserError for
    what stops all of them, on the rank that it befalls.
    """
    target = order.target
    with contextlib.ExitStack() as held:

        def tell_of_waiting() -> None:
            print(f"{target}: another process is writing into it; waiting for that", file=sys.stderr)

        def look() -> dict[str, Entry]:
            try:
                target.mkdir(parents=True, exist_ok=True)
                locks.append(held.enter_context(locked(target, tell_of_waiting)))
            except OSError as error:
                raise AccessError.writing(target, error) from error
            return begin(target, order.form, [stem for job in order.jobs for stem in job.makes])

        locks: list[int] = []
        known = world.on_root(look)
        mine = order.jobs[world.rank :: world.size]
        jobs = ([job.source, [[stem, _noted(known, stem)] for stem in job.makes]] for job in mine)
        entries: list[Entry] = []
        faults: list[str] = []
        made = 0
        with (
            Journal(target, world.rank) as journal,
            progress(len(mine), "done", unit, shown=shown and world.is_root) as advance,
            contextlib.closing(run_jobs(task, jobs, workers, locks)) as answers,
        ):
            for _, answer in world.alone(answers):
                for line in answer["made"]:
                    entries.append(Entry.from_json(line))
                    journal.add(entries[-1])
                made += sum(entry.samples for entry in entries[len(entries) - len(answer["made"]) :])
                entries += [known[stem] for stem in answer["kept"]]
                faults += answer["faults"]
                advance()
        shares = world.gather((entries, made, faults))
        result = Produced(
            sum(share[1] for share in shares),
            sum(sum(entry.samples for entry in share[0]) - share[1] for share in shares),
            tuple(sorted(fault for share in shares for fault in share[2])),
        )
        if not result.faults:
            by_stem = {entry.stem: entry for share in shares for entry in share[0]}
            ordered = [by_stem[stem] for job in order.jobs for stem in job.makes]
            world.on_root(lambda: finish(target, order.form, order.spec, ordered))
        return result


def run(
    orders: Callable[[], Sequence[tuple[Order, Task]]], *, workers: int | None, unit: str, target: Path
) -> int:
    """Produce what `orders`, called on rank 0, gives; the exit status, 0 if every source was sound."""
    world = World.detect()
    with report_errors(world):
        if workers is not None and workers < 1:
            raise ConfigError("--workers", workers, "expected at least one process")
        processes = workers or _PROCESSES_A_CORE * world.cores
        start, result = time.perf_counter(), Produced()
        with world.connected():
            for order, task in world.on_root(orders):
                result += produce(
                    order,
                    task,
                    world=world,
                    workers=processes,
                    unit=unit,
                    shown=True,
                )
        if world.is_root:
            seconds = time.perf_counter() - start
            print(f"{target}: {result.made} samples made in {seconds:.1f} s, {result.kept} were there")
            for fault in result.faults:
                print(f"error: {fault}", file=sys.stderr)
            if result.faults:
                print(
                    f"error: {len(result.faults)} {unit}s are damaged; mend or remove them and run this "
                    "again: it makes what is missing",
                    file=sys.stderr,
                )
    return 1 if result.faults else 0


def _noted(known: Mapping[str, Entry], stem: str) -> list[Any] | None:
    entry = known.get(stem)
    return entry.to_json() if entry else None
