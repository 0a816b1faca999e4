"""Run a conversion: share the work among ranks and workers, keep what is up to date, collect the faults."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from pipelines.console import print_line
from pipelines.dataset.manifest import Entry
from pipelines.distributed.cli import launched, report_errors
from pipelines.distributed.session import Session
from pipelines.errors import ConfigError, writing
from pipelines.sample import SampleSpec
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of
from preprocess.conversion.journal import Journal, journal_path, open_journal
from preprocess.conversion.progress import STOPPED, lock_target, track
from preprocess.conversion.read_failures import ConsecutiveReadFailures
from preprocess.conversion.target import check_folder, check_not_replaced, commit, reopen
from preprocess.conversion.task_result import TaskResult, WorkItem
from preprocess.conversion.worker_pool import fit_workers, run_tasks

_WORKERS_PER_CORE = 2
"""While one waits for the disk, another inflates."""


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Content that a folder is to have, and how it is made.

    target: The folder, which may be one of an object store.
    format_name: Format of the samples, a key of FORMATS.
    spec: Shape of every sample.
    task: Converts one item; see `convert_if_stale`.
    memory: Bytes of memory that a process takes for it, at most.
    items: The sources, each with the entries that it becomes.
    samples: IDs of all samples.
    samples_per_shard: Samples of each shard but the last; None without shards.
    """

    target: Location
    format_name: str
    spec: SampleSpec
    task: Callable[[WorkItem], TaskResult]
    memory: int
    items: Sequence[WorkItem]
    samples: Sequence[str]
    samples_per_shard: int | None = None

    @property
    def target_arguments(self) -> tuple[Location, str, SampleSpec, set[str], Sequence[str], int | None]:
        """Arguments of `check_folder`."""
        names = {name for item in self.items for name in item.entries}
        return self.target, self.format_name, self.spec, names, self.samples, self.samples_per_shard


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """Numbers of samples that were converted and that were up to date, and one line for each fault."""

    written: int = 0
    up_to_date: int = 0
    faults: tuple[str, ...] = ()

    def __add__(self, other: ConversionReport) -> ConversionReport:
        return ConversionReport(
            self.written + other.written, self.up_to_date + other.up_to_date, self.faults + other.faults
        )


def run_conversion(
    plan: ConversionPlan | None, *, session: Session, workers: int, unit: str, shown: bool = False
) -> ConversionReport:
    """Convert the entries of `plan` that are missing or stale, with all ranks of `session`.

    The manifest and the list files are written if no source has a fault. A source with a fault does not keep
    the others from being converted.

    Args:
        plan: What to convert; only rank 0 needs it.
        session: The ranks, all of which call this.
        workers: Worker processes of each rank, if they fit into the memory.
        unit: Name of a source in the progress display.
        shown: Show the progress on rank 0.

    Returns:
        On rank 0 the report of all ranks, the same on the others.

    Raises:
        UserError: Something that stops the whole conversion, on the rank where it happens.
    """
    world = session.world
    with contextlib.ExitStack() as stack:
        lock: int | None = None
        journal: Location | None = None

        def partition() -> list[ConversionPlan]:
            """Lock and open the target; return each rank's part of the plan."""
            nonlocal lock, journal
            assert plan is not None, "rank 0 has the plan"
            if isinstance(plan.target, Path):
                with writing(plan.target):
                    plan.target.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(lock_target(plan.target))
            records = check_folder(*plan.target_arguments)
            settings = {"samples_per_shard": plan.samples_per_shard, "samples": list(plan.samples)}
            finished = {name: entry for name, entry in records.items() if entry.files}
            items = plan.items
            if not isinstance(plan.target, Path):
                # The folder has been listed, so that this takes a request for each missing file alone.
                finished = {name: one for name, one in finished.items() if one.is_complete_in(plan.target)}
                paths = (journal_path(plan.target, plan.format_name, number) for number in count(1))
                items = [item._replace(journal=path) for item, path in zip(items, paths, strict=False)]
            items = [
                item._replace(recorded=[finished[name] for name in item.entries if name in finished])
                for item in items
            ]
            journal = reopen(plan.target, plan.format_name, plan.spec, records.values(), **settings)
            return [replace(plan, items=items[rank :: world.size], samples=()) for rank in range(world.size)]

        own = session.scatter(partition)
        entries: list[Entry] = []
        report = ConversionReport()
        shown = shown and world.is_root
        workers = fit_workers(workers, own.memory, world.memory, shown=shown)
        failures = ConsecutiveReadFailures()
        with (
            session.own_errors(),
            open_journal(own.target, own.format_name, own.spec, world.rank) as own_journal,
            contextlib.closing(run_tasks(own.task, _begin(own.items, own_journal), workers, lock)) as running,
        ):
            for item, result in track(running, len(own.items), "done", unit, shown=shown):
                failures.record(result.unreadable)
                done = item.records(result.written)
                if own_journal:
                    own_journal.add(done)
                entries += done
                report += ConversionReport(
                    sum(entry.samples for entry in result.written),
                    sum(entry.samples for entry in item.recorded) if result.up_to_date else 0,
                    tuple(result.faults),
                )
        gathered = session.gather_to_root((entries, report))

        def commit_if_complete() -> ConversionReport:
            assert plan is not None and journal is not None, "rank 0 has both"
            total = sum((report for _, report in gathered), ConversionReport())
            if not total.faults:
                by_name = {entry.name: entry for entries, _ in gathered for entry in entries}
                ordered = [by_name[name] for item in plan.items for name in item.entries]
                if not isinstance(plan.target, Path):
                    check_not_replaced(journal)
                commit(plan.target, plan.format_name, plan.spec, ordered)
            return replace(total, faults=tuple(sorted(total.faults)))

        return session.run_on_root(commit_if_complete)


def run(
    make_plans: Callable[[], list[ConversionPlan]],
    workers: int | None,
    unit: str,
    target: Location,
    *,
    done: str = "converted",
) -> int:
    """Run the conversions that `make_plans` returns on rank 0; return the exit status, 0 without faults.

    Args:
        make_plans: Called on rank 0 alone.
        workers: Processes of each rank; None for two a core.
        unit: Name of a source in the progress display.
        target: What the last line names.
        done: What has been done to the samples, for that line.
    """
    world = launched()
    with report_errors(world, STOPPED) as session:
        if workers is not None and workers < 1:
            raise ConfigError("--workers", workers, "expected at least one process")
        start, total = time.perf_counter(), ConversionReport()
        plans: list[ConversionPlan] = []

        def plan_all() -> None:
            plans.extend(make_plans())
            # The splits of a data set belong together: if one is refused, the others must not change either.
            for plan in plans:
                if storage_of(plan.target).is_present(plan.target):
                    with lock_target(plan.target):
                        check_folder(*plan.target_arguments)

        session.connect()
        session.run_on_root(plan_all)
        for number in range(session.run_on_root(lambda: len(plans))):
            total += run_conversion(
                plans[number] if world.is_root else None,
                session=session,
                workers=workers or _WORKERS_PER_CORE * world.cores,
                unit=unit,
                shown=True,
            )
        if world.is_root:
            numbers = f"{total.written} samples {done}, {total.up_to_date} up to date"
            print_line(f"{target}: {numbers}, {time.perf_counter() - start:.1f} s")
            for fault in total.faults:
                print_line(f"error: {fault}", sys.stderr)
            if total.faults:
                print(
                    f"error: {len(total.faults)} {unit}s are damaged or cannot be read; fix them and run the "
                    "same command again, which converts what is missing, or convert a source without them "
                    "into a new folder",
                    file=sys.stderr,
                )
    return 1 if total.faults else 0


def _begin(items: Iterable[WorkItem], journal: Journal | None) -> Iterator[WorkItem]:
    """Yield `items`, each recorded as begun."""
    for item in items:
        if journal:
            journal.begin(item.entries)
        yield item
