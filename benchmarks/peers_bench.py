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
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.peers.contract import Peer, Resume
from benchmarks.peers.disk import drop_from_cache, limited_disk
from benchmarks.peers.process import LEAD, Figures, Task
from benchmarks.peers.registry import PEERS
from benchmarks.picture import draw
from benchmarks.samples import make_splits
from pipelines.errors import UserError
from pipelines.tables import format_table

_ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 300.0
"""Seconds after which a row's process is stopped."""

Storage = Literal["cache", "disk"]


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


class RowError(Exception):
    """A row's process failed; the text is the last line of its errors."""


class Bench:
    """Files and processes of the rows.

    Args:
        root: Folder of all files.
        options: The command line.
        storage: Where samples are read from.
        limit: Puts a process under the limit of the disk.
    """

    def __init__(
        self, root: Path, options: argparse.Namespace, storage: Storage, limit: Callable[[], None] | None
    ) -> None:
        self._options, self._storage, self._limit = options, storage, limit
        self._source = make_splits(root, ["npy"], options.samples, options.size)["npy"].root
        # A pass from a disk must not read a sample twice: the page cache would deliver it.
        needed = options.steps + 3 * LEAD if storage == "disk" else 1
        self._copies = -(-needed // options.samples)
        self._root = root / f"{options.samples}x{self._copies}x{options.size}"

    def prepare(self, peer: Peer) -> None:
        """Write the files of a row, unless they exist, and check the values that it delivers."""
        folder = self._root / peer.form
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir(parents=True, exist_ok=True)
            self._run("write", peer, partial)
            partial.rename(folder)
        self._run("check", peer, folder)

    def measure(self, peer: Peer) -> Figures:
        """Measure a row once."""
        folder = self._root / peer.form
        if self._storage == "disk":
            drop_from_cache(folder)
        return Figures(**json.loads(self._run(self._storage, peer, folder)))

    def disk_mb(self, peer: Peer) -> float:
        """Return the MB of files per sample."""
        files = (self._root / peer.form).rglob("*")
        stored = sum(file.stat().st_size for file in files if file.is_file())
        return stored / 1e6 / (self._options.samples * self._copies)

    def _run(self, action: Literal["write", "check", "cache", "disk"], peer: Peer, folder: Path) -> str:
        samples, size = self._options.samples * self._copies, self._options.size
        task = Task(action, peer.name, str(self._source), str(folder), samples, size, self._options.steps)
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch) / "result.json"
            command = [sys.executable, "-m", "benchmarks.peers.process"]
            try:
                done = subprocess.run(
                    [*command, json.dumps(dataclasses.asdict(task)), str(result)],
                    cwd=_ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    timeout=_LIMIT_S,
                    text=True,
                    errors="replace",
                    preexec_fn=self._limit,
                )
            except subprocess.TimeoutExpired:
                raise RowError(f"{action}: not finished after {_LIMIT_S:g} s") from None
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                raise RowError(f"{action}: {lines[-1]}")
            return result.read_text() if result.exists() else ""


def compare(bench: Bench, peers: Sequence[Peer], rounds: int) -> tuple[dict[str, Row], dict[str, str]]:
    """Measure `peers` in turns; return their rows, and the errors of those that failed."""
    figures: dict[str, list[Figures]] = {}
    errors: dict[str, str] = {}
    for peer in peers:
        with _noted(errors, peer):
            bench.prepare(peer)
            figures[peer.name] = []
    for number in range(rounds):
        for peer in peers:
            if peer.name in figures and peer.name not in errors:
                with _noted(errors, peer):
                    figures[peer.name].append(bench.measure(peer))
        print(f"round {number + 1} of {rounds} measured", file=sys.stderr)
    complete = {peer.name: peer for peer in peers if peer.name not in errors}
    rows = {}
    for name, peer in complete.items():
        each = figures[name]
        pairs = zip(each, figures[next(iter(complete))], strict=True)
        rows[name] = Row(
            samples_per_s=harness.Spread.of(one.samples_per_s for one in each),
            cpu_ms=harness.Spread.of(one.cpu_ms for one in each),
            cpu_of_first=harness.Spread.of(one.cpu_ms / first.cpu_ms for one, first in pairs),
            disk_mb=bench.disk_mb(peer),
            first_ms=statistics.median(one.first_ms for one in each),
            peak_mb=statistics.median(one.peak_mb for one in each),
            resume=peer.resume,
            rounds=each,
        )
    return rows, errors


@contextlib.contextmanager
def _noted(errors: dict[str, str], peer: Peer) -> Any:
    try:
        yield
    except RowError as error:
        errors[peer.name] = str(error)
        print(f"{peer.name}: {error}", file=sys.stderr)


def show(title: str, rows: dict[str, Row], errors: dict[str, str]) -> None:
    """Print the table."""
    print(title)
    table = [["", "CPU ms/sample", "/ first", "samples/s", "MB on disk", "first batch ms", "peak MB"]]
    table[0] += ["resumes", "other ranks"]
    for name, row in rows.items():
        cells = [name, row.cpu_ms.text(1), f"{row.cpu_of_first.median:.2f}", row.samples_per_s.text(0)]
        cells += [f"{row.disk_mb:.2f}", f"{row.first_ms:.0f}", f"{row.peak_mb:.0f}"]
        table.append([*cells, *("yes" if each else "no" for each in row.resume[:2])])
    print(format_table(table))
    for name, error in errors.items():
        print(f"{name}: failed: {error}")


def _missing(peer: Peer) -> list[str]:
    """Return the top modules of a row that are not installed."""
    tops = {module.partition(".")[0] for module in peer.modules}
    return sorted(top for top in tops if importlib.util.find_spec(top) is None)


def _versions(peers: Sequence[Peer]) -> dict[str, str]:
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
    peers = [PEERS[name] for name in options.rows if not _missing(PEERS[name])]
    for name in options.rows:
        if missing := _missing(PEERS[name]):
            print(f"{name}: left out, {' and '.join(missing)} not installed (see benchmarks/peers.txt)")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    results: dict[str, dict[str, Row]] = {}
    failed: dict[str, dict[str, str]] = {}
    with contextlib.ExitStack() as stack:
        root = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings: dict[str, tuple[Storage, Callable[[], None] | None]] = {"page cache": ("cache", None)}
        if options.disk:
            root.mkdir(parents=True, exist_ok=True)
            limit = stack.enter_context(limited_disk(root, 10**6 * options.disk))
            settings[f"disk of {options.disk} MB/s"] = ("disk", limit)
        for title, (storage, enter) in settings.items():
            bench = Bench(root, options, storage, enter)
            results[title], failed[title] = compare(bench, peers, options.rounds)
            show(title, results[title], failed[title])
    if options.output:
        record = {**results, "failed": failed, "packages": _versions(peers)}
        path = harness.save("peers_bench", vars(options), record, options.output, started)
        print("written to", path)
        draw(results, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
