"""Fill a folder with samples: share out the work, keep what is there, collect the faults."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from pipelines.dataset.manifest import Entry
from pipelines.distributed.cli import launched, report_errors
from pipelines.distributed.session import Session
from pipelines.errors import AccessError, ConfigError
from pipelines.io import locked
from pipelines.sample import SampleSpec
from preprocess.conversion.journal import Journal, Ready, begin, clear, finish, suspend
from preprocess.conversion.progress import STOPPED, progress
from preprocess.conversion.read_failures import Lost
from preprocess.conversion.worker_pool import Task, run_jobs

_PROCESSES_A_CORE = 2
"""While one waits for the disk, another inflates."""


class Job(NamedTuple):
    """What the task is told of a source, as JSON can hold it, and the stems of the entries it becomes."""

    source: Any
    makes: Sequence[str]


_Share: TypeAlias = "list[tuple[Job, list[Entry | None]]]"
"""Jobs, and of each what is noted of the entries that it makes."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a folder shall hold.

    target: the folder.
    form: the format, a key of FORMATS.
    spec: the shape of every sample.
    jobs: what is made at a time; rank 0 alone needs to know.
    samples: the stems of all samples of the source, of other splits too; rank 0 alone needs to know.
    prune: whether samples that the source has not are removed from the folder, or refused.
    """

    target: Path
    format_name: str
    spec: SampleSpec
    jobs: Sequence[Job]
    samples: Sequence[str]
    prune: bool = False


@dataclass(frozen=True, slots=True)
class Produced:
    """What became of orders: samples made, samples that were there, and the faults of sources."""

    made: int = 0
    kept: int = 0
    faults: tuple[str, ...] = ()

    def __add__(self, other: Produced) -> Produced:
        return Produced(self.made + other.made, self.kept + other.kept, self.faults + other.faults)


class _Outcome(NamedTuple):
    """What became of a rank's share; see `make_entries`."""

    made: list[Entry]
    kept: list[Entry]
    spoiled: list[str]
    faults: list[str]
    lost: list[str]


def produce(
    order: Order, task: Task, *, session: Session, workers: int, unit: str, shown: bool = False
) -> Produced:
    """Make what is missing of `order`, with the ranks of `session`.

    Each rank has `workers` processes do its share. `task` is asked for a source at a time, as
    `make_entries` wants to be called. The manifest and the list files are written if every source
    was sound; one that is damaged keeps none of the others from being used. Raises a UserError for
    what stops all of them, on the rank that it befalls.
    """
    target = order.target
    with contextlib.ExitStack() as held:

        def tell_of_waiting() -> None:
            print(f"{target}: another process is writing into it; waiting for that", file=sys.stderr)

        def share() -> list[_Share]:
            try:
                target.mkdir(parents=True, exist_ok=True)
                locks.append(held.enter_context(locked(target, tell_of_waiting)))
            except OSError as error:
                raise AccessError.writing(target, error) from error
            stems = (stem for job in order.jobs for stem in job.makes)
            ready.append(
                begin(target, order.format_name, order.spec, stems, order.samples, prune=order.prune)
            )
            wanted = [(job, [ready[0].known.get(stem) for stem in job.makes]) for job in order.jobs]
            return [wanted[rank :: session.world.size] for rank in range(session.world.size)]

        def jobs() -> Iterator[Any]:
            for job, noted in mine:
                journal.begin(job.makes)
                yield [job.source, _lines(job, noted)]

        locks: list[int] = []
        ready: list[Ready] = []
        mine = session.scatter(share)
        before = {entry.name: entry for _, noted in mine for entry in noted if entry}
        own = _Outcome([], [], [], [], [])
        with (
            Journal(target, order.format_name, order.spec, session.world.rank) as journal,
            progress(len(mine), "done", unit, shown=shown and session.world.is_root) as advance,
            contextlib.closing(run_jobs(task, jobs(), workers, locks)) as answers,
        ):
            for answer in session.tag_rank_errors(_unless_lost(answers)):
                for line in answer["made"]:
                    own.made.append(Entry.from_json(line))
                    journal.add(own.made[-1])
                for stem in answer["kept"]:
                    own.kept.append(before[stem])
                    journal.add(own.kept[-1])
                own.spoiled.extend(answer["spoiled"])
                own.faults.extend(answer["faults"])
                own.lost.extend(answer["lost"])
                advance()
        outcomes = session.gather_to_root(own)
        return session.run_on_root(lambda: _settle(order, ready[0], outcomes))


def _settle(order: Order, ready: Ready, outcomes: Sequence[_Outcome]) -> Produced:
    """Leave the folder as its samples are: finished, or with notes of what is sound."""
    result = Produced(
        sum(entry.samples for outcome in outcomes for entry in outcome.made),
        sum(entry.samples for outcome in outcomes for entry in outcome.kept),
        tuple(sorted(line for outcome in outcomes for line in (*outcome.faults, *outcome.lost))),
    )
    sound = (entry for outcome in outcomes for entry in (*outcome.made, *outcome.kept))
    entries = {entry.name: entry for entry in sound}
    if result.faults:
        spoiled = [stem for outcome in outcomes for stem in outcome.spoiled]
        begun = (Entry(stem, ()) for stem in spoiled)
        suspend(order.target, order.format_name, order.spec, [*entries.values(), *ready.unwanted, *begun])
        clear(order.target, order.format_name, spoiled)
    if not any(outcome.lost for outcome in outcomes):
        # Of what cannot be read, something may be in there that is nowhere else.
        clear(order.target, order.format_name, ready.surplus)
    if not result.faults:
        ordered = [entries[stem] for job in order.jobs for stem in job.makes]
        finish(order.target, order.format_name, order.spec, ordered)
    return result


def run(
    orders: Callable[[], Sequence[tuple[Order, Task]]], *, workers: int | None, unit: str, target: Path
) -> int:
    """Produce what `orders`, called on rank 0, gives; the exit status, 0 if every source was sound."""
    world = launched()
    with report_errors(world, STOPPED) as session:
        if workers is not None and workers < 1:
            raise ConfigError("--workers", workers, "expected at least one process")
        processes = workers or _PROCESSES_A_CORE * world.cores
        start, result = time.perf_counter(), Produced()
        ordered: list[tuple[Order, Task]] = []

        def heads() -> list[tuple[Order, Task]]:
            ordered.extend(orders())
            return [(replace(order, jobs=(), samples=()), task) for order, task in ordered]

        session.connect()
        for number, (head, task) in enumerate(session.run_on_root(heads)):
            result += produce(
                ordered[number][0] if world.is_root else head,
                task,
                session=session,
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
                    f"error: {len(result.faults)} {unit}s are damaged or cannot be read; mend them, "
                    "or remove them and add --prune, and run this again: it makes what is missing",
                    file=sys.stderr,
                )
    return 1 if result.faults else 0


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Let the command line say what `Order.prune` is."""
    parser.add_argument(
        "--prune", action="store_true", help="remove samples from the output that the input has no longer"
    )


def _unless_lost(answers: Iterable[tuple[Any, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What workers answer; AccessError where sources in a row cannot be read."""
    lost = Lost()
    for _, answer in answers:
        lost.note(answer["unread"])
        yield answer


def _lines(job: Job, noted: Sequence[Entry | None]) -> list[list[Any]]:
    """What `make_entries` wants to know of `job`."""
    return [[stem, entry.to_json() if entry else None] for stem, entry in zip(job.makes, noted, strict=True)]
