"""Compare this project's loader with those of other projects, on the same samples in the files of each.

    make peers
    make peers ARGS="--rounds 5 --disk 500 --output"

Every row delivers batches of one float32 volume log(count + 1) and its target, in random order, with two
workers (processes or threads). Rows take turns, each turn in a process of its own. Their values are compared
with the samples first. Rows whose packages are not installed are left out; a row that fails shows its error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeVar

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.peers.contract import Peer, Resume
from benchmarks.peers.disk import drop_from_cache, limited_disk
from benchmarks.peers.process import LEAD, Action, Figures, RowError, Task, run_task
from benchmarks.peers.registry import PEERS
from benchmarks.picture import draw
from benchmarks.samples import make_splits
from pipelines.errors import UserError
from pipelines.tables import format_table

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """Storage that samples are read from.

    Attributes:
        title: Its name in the results.
        storage: The action of a row's process.
        enter: Puts a process under the limit of the disk.
        mb_per_s: This limit.
    """

    title: str
    storage: Literal["cache", "disk"]
    enter: Callable[[], None] | None = None
    mb_per_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Row:
    """Result of a row: medians over the rounds, except `samples_per_s` and `cpu_ms`.

    Attributes:
        cpu_of_first: CPU time per sample relative to the first row's in the same round.
        disk_mb: MB of files per sample.
        rounds: Figures of each round.
    """

    samples_per_s: harness.Spread
    cpu_ms: harness.Spread
    cpu_of_first: harness.Spread
    disk_mb: float
    first_ms: float
    peak_mb: float
    resume: Resume
    rounds: list[Figures]


class Bench:
    """Files and processes of the rows.

    Args:
        root: Folder of all files.
        options: The command line.
    """

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self._options = options
        self._source = make_splits(root, ["npy"], options.samples, options.size)["npy"].root
        # A pass over a disk reads no sample twice: the second time, it would be in the page cache.
        copies = -(-(options.steps + 2 * LEAD) // options.samples) if options.disk else 1
        self._samples = copies * options.samples
        self._root = root / f"{options.samples}x{copies}x{options.size}"

    def prepare(self, peer: Peer) -> None:
        """Write the files of a row, unless they exist, and check the values that it delivers."""
        folder = self._root / peer.files
        if not folder.exists():
            # Written under another name, so that an interrupted set does not look complete.
            unfinished = folder.with_suffix(".partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            self._run("write", peer, unfinished)
            unfinished.rename(folder)
        self._run("check", peer, folder)

    def measure(self, peer: Peer, setting: Setting) -> Figures:
        """Measure a row once."""
        for file in self._files(peer):
            if setting.storage == "disk":
                drop_from_cache(file)
            else:
                file.read_bytes()
        result = self._run(setting.storage, peer, self._root / peer.files, setting.enter)
        return Figures(**json.loads(result))

    def disk_mb(self, peer: Peer) -> float:
        """Return the MB of files per sample."""
        return sum(file.stat().st_size for file in self._files(peer)) / 1e6 / self._samples

    def _files(self, peer: Peer) -> list[Path]:
        return [path for path in (self._root / peer.files).rglob("*") if path.is_file()]

    def _run(self, action: Action, peer: Peer, folder: Path, enter: Callable[[], None] | None = None) -> str:
        """Run the process of a row; return its figures in JSON, if it measures any."""
        size, steps = self._options.size, self._options.steps
        task = Task(action, peer.name, str(self._source), str(folder), self._samples, size, steps)
        return run_task(task, enter)


def compare(
    bench: Bench, peers: Sequence[Peer], setting: Setting, rounds: int, errors: dict[str, str]
) -> dict[str, Row]:
    """Measure `peers` in turns; return the rows of those that are not, and did not come, in `errors`."""
    figures: dict[str, list[Figures]] = {peer.name: [] for peer in peers}
    for number in range(rounds):
        for peer in peers:
            if measured := attempt(partial(bench.measure, peer, setting), peer.name, errors):
                figures[peer.name].append(measured)
        print(f"{setting.title}: round {number + 1} of {rounds}", file=sys.stderr)
    complete = [peer for peer in peers if peer.name not in errors]
    rows = {}
    for peer in complete:
        each = figures[peer.name]
        pairs = zip(each, figures[complete[0].name], strict=True)
        # What was read ahead before the timed batches would make a row faster than its disk.
        disk_mb = bench.disk_mb(peer)
        limit = setting.mb_per_s / disk_mb
        rows[peer.name] = Row(
            samples_per_s=harness.Spread.of(min(one.samples_per_s, limit) for one in each),
            cpu_ms=harness.Spread.of(one.cpu_ms for one in each),
            cpu_of_first=harness.Spread.of(one.cpu_ms / first.cpu_ms for one, first in pairs),
            disk_mb=disk_mb,
            first_ms=statistics.median(one.first_ms for one in each),
            peak_mb=statistics.median(one.peak_mb for one in each),
            resume=peer.resume,
            rounds=each,
        )
    return rows


def attempt(work: Callable[[], T], name: str, errors: dict[str, str]) -> T | None:
    """Return `work()`; if row `name` is in `errors`, or fails and is then added to them, None."""
    if name not in errors:
        try:
            return work()
        except RowError as error:
            errors[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
    return None


def show(title: str, rows: dict[str, Row]) -> None:
    """Print the table."""
    print(title)
    table = [["", "CPU ms/sample", "/ first", "samples/s", "MB on disk", "first batch ms", "peak MB"]]
    table[0] += ["resumes", "other ranks"]
    for name, row in rows.items():
        cells = [name, row.cpu_ms.text(1), f"{row.cpu_of_first.median:.2f}", row.samples_per_s.text(0)]
        cells += [f"{row.disk_mb:.2f}", f"{row.first_ms:.0f}", f"{row.peak_mb:.0f}"]
        table.append([*cells, *("yes" if each else "no" for each in row.resume[:2])])
    print(format_table(table))


def missing(peer: Peer) -> list[str]:
    """Return the top modules of a row that are not installed."""
    tops = {module.partition(".")[0] for module in peer.modules}
    return sorted(top for top in tops if importlib.util.find_spec(top) is None)


def versions(peers: Sequence[Peer]) -> dict[str, str]:
    """Return the versions of the packages that rows need."""
    tops = {module.partition(".")[0] for peer in peers for module in peer.modules}
    packages = metadata.packages_distributions()
    return {name: metadata.version(name) for top in sorted(tops) for name in packages.get(top, [])[:1]}


def _names(text: str) -> list[str]:
    parts = text.split(";")
    if unknown := set(parts) - PEERS.keys():
        raise argparse.ArgumentTypeError(f"{min(unknown)} is none of {'; '.join(PEERS)}")
    return parts


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder of the files (default: temporary)")
    parser.add_argument("--rows", type=_names, default=list(PEERS), help="names, separated by semicolons")
    parser.add_argument("--samples", type=harness.positive, default=8, help="number of different samples")
    parser.add_argument("--size", type=int, default=128, choices=(32, 64, 128), help="edge in voxels")
    parser.add_argument("--steps", type=harness.positive, default=32, help="timed batches of a turn")
    parser.add_argument("--rounds", type=harness.positive, default=5, help="turns of each row")
    parser.add_argument(
        "--disk", type=harness.positive, metavar="MB_PER_S", help="also from a disk of that speed; as root"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Row]]:
    """Run the command line; return the rows by setting."""
    options, started = _options(argv), time.localtime()
    peers = [PEERS[name] for name in options.rows if not missing(PEERS[name])]
    for name in options.rows:
        if absent := missing(PEERS[name]):
            print(f"{name}: left out, {' and '.join(absent)} not installed (see benchmarks/peers.txt)")
    results: dict[str, dict[str, Row]] = {}
    errors: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        root = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = [Setting("page cache", "cache")]
        if options.disk:
            root.mkdir(parents=True, exist_ok=True)
            enter = stack.enter_context(limited_disk(root, 10**6 * options.disk))
            settings.append(Setting(f"disk of {options.disk} MB/s", "disk", enter, options.disk))
        bench = Bench(root, options)
        for peer in peers:
            attempt(partial(bench.prepare, peer), peer.name, errors)
        for setting in settings:
            rows = results[setting.title] = compare(bench, peers, setting, options.rounds, errors)
            show(setting.title, rows)
        for name, error in errors.items():
            print(f"{name}: failed: {error}")
    if options.output:
        record = {**results, "failed": errors, "packages": versions(peers)}
        path = harness.save("peers_bench", vars(options), record, options.output, started)
        print("written to", path)
        draw(results, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
