"""Measure the input stage alone: samples per second, and CPU time per sample, from file to torch tensor.

    python benchmarks/io_bench.py
    python benchmarks/io_bench.py --batch-size 1,4 --threads 1,2,4 --storage cache,direct --output
    python benchmarks/io_bench.py --emulate h100

The project's loader reads each format, in turns with a straightforward program for the same files (a torch
DataLoader with two workers: np.load and log1p for npy, gzip and np.frombuffer for the others), with the
minimum cost of its bytes on this machine (read them, copy a volume: the limit), and with DALI's numpy reader
(the floor). All deliver float32 logarithms (B, 4, size, size, size) in the same shuffled order. Samples are
simulated, 128 Mpc/h along an edge. There is no network; with --emulate, accelerators that sleep for the
compute time of real ones replace it, as in MLPerf Storage.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.candidates import (
    PlainGzip,
    PlainNpy,
    bytes_read,
    dali_numpy,
    limit,
    plain_loader,
    project_loader,
)
from benchmarks.emulation import Utilisation, emulate, parse_seconds, show_utilisation
from benchmarks.picture import draw
from benchmarks.samples import KINDS, make_splits
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.distributed.cli import location
from pipelines.formats.registry import FORMATS
from pipelines.loading.config import LoaderConfig
from pipelines.storage.location import Url
from pipelines.tables import format_table

FLOOR, NPY_PLAIN, GZIP_PLAIN = "DALI numpy reader", "DataLoader of npy", "DataLoader of gzip"
PUBLISHED = "tfrecord_gzip"

TARGETS = {
    "npy": {"cpu_of_floor": 1.25, "speed_of_plain": 4.0},
    "packed": {"cpu_ms": 10.0, "speed_of_plain": 10.0},
}
"""Targets for 128^3: for npy the maximum CPU time relative to the floor, for packed the maximum CPU time in
ms, and for both the minimum speed relative to the plain program."""

_LEAD = 8
"""Warm-up batches of a turn: more than any candidate holds ready."""

Storage = Literal["cache", "direct"]
STORAGE: tuple[Storage, ...] = ("cache", "direct")


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a comparison: samples per batch, threads that read and that decode, and storage."""

    batch_size: int
    threads: int
    storage: Storage

    def __str__(self) -> str:
        read = "page cache" if self.storage == "cache" else "O_DIRECT"
        return f"batch {self.batch_size}, {self.threads} threads, {read}"

    @property
    def config(self) -> LoaderConfig:
        """Configuration of the loader."""
        return LoaderConfig(self.batch_size, self.threads, direct_io=self.storage == "direct")


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of a candidate, absolute and relative to others.

    Attributes:
        figures: See `harness.Summary`.
        bytes_read: Bytes from files per sample.
        plain, limit: Names of the candidates that serve as these.
        cpu_of_floor, cpu_of_limit: CPU time per sample relative to theirs; below 1 is less.
        speed_of_plain: Samples per second relative to the plain program's; above 1 is faster.
        cpu_saving: CPU time per sample of the plain program relative to this one's; above 1 is less.
    """

    figures: harness.Summary
    bytes_read: float
    plain: str
    limit: str
    cpu_of_floor: harness.Spread
    cpu_of_limit: harness.Spread
    speed_of_plain: harness.Spread
    cpu_saving: harness.Spread


def run(
    splits: dict[str, SampleDataset], formats: Sequence[str], setting: Setting, steps: int, rounds: int
) -> dict[str, Result]:
    """Compare `formats` at `setting` in `rounds` rounds of `steps` batches."""
    batch_size, threads, direct = setting.batch_size, setting.threads, setting.config.direct_io
    with contextlib.ExitStack() as stack:
        plain = {
            NPY_PLAIN: plain_loader(PlainNpy(splits["npy"]), splits["npy"], batch_size),
            GZIP_PLAIN: plain_loader(PlainGzip(splits[PUBLISHED]), splits[PUBLISHED], batch_size),
        }
        for batches in plain.values():
            stack.enter_context(contextlib.closing(batches))
            # The workers start and import torch now, before anything is timed.
            next(batches)
        of = {NPY_PLAIN: "npy", GZIP_PLAIN: PUBLISHED, FLOOR: "npy"}
        candidates = {}
        for format_name, device in itertools.product(formats, _devices()):
            name = _on(format_name, device)
            candidates[name] = stack.enter_context(
                project_loader(splits[format_name], setting.config, device)
            )
            of[name] = format_name
        for format_name in dict.fromkeys(of.values()):
            candidates[_limit(format_name)] = limit(splits[format_name], batch_size, threads, direct=direct)
            of[_limit(format_name)] = format_name
        candidates[FLOOR] = dali_numpy(splits["npy"], batch_size, threads, direct=direct)
        for name in (FLOOR, *map(_limit, set(of.values()))):
            stack.enter_context(contextlib.closing(candidates[name]))  # type: ignore[type-var]
        candidates |= plain
        readings = harness.measure(candidates, rounds=rounds, lead=_LEAD, steps=steps)
    results = {}
    for name, each in readings.items():
        split = splits[of[name]]
        first = NPY_PLAIN if split.format_name == "npy" else GZIP_PLAIN
        least = _limit(split.format_name)
        results[name] = Result(
            figures=harness.summarise(each, split.spec.bytes),
            bytes_read=float(bytes_read(split).mean()),
            plain=first,
            limit=least,
            cpu_of_floor=harness.ratio(each, readings[FLOOR], "cpu"),
            cpu_of_limit=harness.ratio(each, readings[least], "cpu"),
            speed_of_plain=harness.ratio(readings[first], each, "wall"),
            cpu_saving=harness.ratio(readings[first], each, "cpu"),
        )
    return results


def _limit(format_name: str) -> str:
    return f"limit of {format_name}"


def _on(format_name: str, device: str) -> str:
    """Return the name of the row of `format_name`."""
    return format_name if device == "cpu" else f"{format_name}, GPU"


def _devices() -> list[str]:
    return ["cpu", "cuda:0"] if torch.cuda.is_available() else ["cpu"]


def show(setting: Setting, results: dict[str, Result]) -> None:
    """Print medians, 10th and 90th percentiles over the rounds, and the targets."""
    print(setting)
    header = ["", "samples/s", "CPU ms/sample", "MB read", "p50/p95/p99 ms", "CPU/floor", "CPU/limit"]
    table = [[*header, "speed/plain", "plain CPU/own"]]
    for name, result in results.items():
        figures = result.figures
        latency = "/".join(f"{value:.1f}" for value in figures.latency_ms)
        read, ratios = f"{result.bytes_read / 1e6:.1f}", (result.cpu_of_floor, result.cpu_of_limit)
        row = [name, figures.samples_per_s.text(1), figures.cpu_ms.text(1), read, latency]
        row += [f"{ratio.median:.2f}" for ratio in ratios]
        table.append([*row, result.speed_of_plain.text(1), f"{result.cpu_saving.median:.1f}"])
    print(format_table(table))
    print(f"floor: {FLOOR}; plain: {NPY_PLAIN} for npy, {GZIP_PLAIN} for the others; medians (p10-p90)")
    if setting.config.direct_io:
        print("the plain programs read from the page cache in any case")
    for format_name, targets in TARGETS.items():
        if format_name not in results:
            continue
        for quantity, target in targets.items():
            result = results[format_name]
            value = result.figures.cpu_ms if quantity == "cpu_ms" else getattr(result, quantity)
            most = "least" if quantity.startswith("speed") else "most"
            print(f"{format_name}, {quantity}: {value.median:.2f}; target at 128^3: at {most} {target:g}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    text = "folder of the samples (default: temporary); with --emulate also the URL of samples that are there"
    parser.add_argument("--data-dir", type=location, help=text)
    known = partial(harness.among, known=KINDS)
    parser.add_argument("--formats", type=known, default=list(FORMATS), help="of the loader, comma-separated")
    parser.add_argument("--samples", type=harness.positive, default=8, help="number of samples")
    parser.add_argument("--steps", type=harness.positive, default=16, help="timed batches of a turn")
    parser.add_argument("--size", type=int, default=128, choices=(32, 64, 128, 256), help="edge in voxels")
    parser.add_argument("--batch-size", type=harness.numbers, default=[1], help="comma-separated")
    parser.add_argument(
        "--threads", type=harness.numbers, default=[2], help="of the reader, and of the decoder"
    )
    known = partial(harness.among, known=STORAGE)
    parser.add_argument("--storage", type=known, default=["cache"], help="cache, direct (O_DIRECT), or both")
    parser.add_argument(
        "--rounds",
        type=harness.positive,
        default=7,
        help="turns of each candidate; with --emulate, one turn with four times as many batches in total",
    )
    text = "h100, a100, or compute time of a step in seconds"
    parser.add_argument("--emulate", type=parse_seconds, help=text)
    text = "number of emulated accelerators"
    parser.add_argument("--accelerators", type=harness.positive, default=1, help=text)
    options = parser.parse_args(argv)
    if isinstance(options.data_dir, Url) and not options.emulate:
        parser.error(f"--data-dir {options.data_dir}: the other programs read files; add --emulate")
    if options.samples < max(options.batch_size):
        parser.error(
            f"--samples {options.samples}: must be at least the batch size {max(options.batch_size)}"
        )
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the command line; return the results by setting and candidate."""
    options = _options(argv)
    settings = [
        Setting(*each) for each in itertools.product(options.batch_size, options.threads, options.storage)
    ]
    with contextlib.ExitStack() as stack:
        root = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.emulate:
            if isinstance(root, Path):
                splits = make_splits(root, options.formats, options.samples, options.size)
            else:
                splits = {str(root): open_folder(root)}
            return _emulate(splits, settings, options)
        # The plain programs, the floor and the limits need these formats in any case.
        splits = make_splits(
            root, sorted({*options.formats, "npy", PUBLISHED}), options.samples, options.size
        )
        results = {}
        for setting in settings:
            results[str(setting)] = run(splits, options.formats, setting, options.steps, options.rounds)
            show(setting, results[str(setting)])
    if options.output:
        path = harness.save("io_bench", vars(options), {"bars": TARGETS, **results}, options.output)
        pictured = {
            setting: {name: row.figures for name, row in rows.items()} for setting, rows in results.items()
        }
        print("written to", path)
        draw(pictured, path.with_suffix(".png"))
    return results


def _emulate(
    splits: dict[str, SampleDataset], settings: Sequence[Setting], options: argparse.Namespace
) -> dict[str, dict[str, Utilisation]]:
    found: dict[str, dict[str, Utilisation]] = {}
    for setting in settings:
        seconds, steps = options.emulate * setting.batch_size, 4 * options.steps * options.rounds
        print(setting)
        found[str(setting)] = {
            _on(format_name, device): emulate(
                split,
                setting.config,
                seconds,
                device=device,
                accelerators=options.accelerators,
                steps=steps,
            )
            for format_name, split in splits.items()
            for device in _devices()
        }
        show_utilisation(found[str(setting)], seconds)
    if options.output:
        print("written to", harness.save("io_bench_emulated", vars(options), found, options.output))
    return found


if __name__ == "__main__":
    main()
