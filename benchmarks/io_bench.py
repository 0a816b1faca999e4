"""The input stage alone: samples a second, and processor time a sample, from file to torch tensor.

    python benchmarks/io_bench.py
    python benchmarks/io_bench.py --batch-size 1,4 --threads 1,2,4 --storage cache,direct --output
    python benchmarks/io_bench.py --emulate h100

Each format through the project's loader takes turns with what one would write first for the same files
(a torch DataLoader of two workers: np.load and log1p for npy, gzip and np.frombuffer for the others),
with the least that its bytes cost on this machine (read them, copy a volume: the limit), and with DALI's
own numpy reader (the floor). All deliver (B, 4, size, size, size) float32 logarithms in the same
shuffled order. Samples are simulated, 128 Mpc/h a side. The network is left out; with --emulate,
accelerators that sleep as long as real ones compute stand for it, as in MLPerf Storage.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
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
from benchmarks.emulation import PASSING, SECONDS, Utilisation, emulate
from benchmarks.picture import draw
from benchmarks.samples import make_splits
from pipelines.dataset.dataset import SampleDataset
from pipelines.formats.registry import FORMATS
from pipelines.loading.config import LoaderConfig

FLOOR, NPY_PLAIN, GZIP_PLAIN = "DALI numpy reader", "DataLoader of npy", "DataLoader of gzip"
PUBLISHED = "tfrecord_gzip"

TARGETS = {
    "npy": {"cpu_of_floor": 1.25, "speed_of_plain": 4.0},
    "packed": {"cpu_ms": 10.0, "speed_of_plain": 10.0},
}
"""What the project claims of 128^3: of npy at most so much of the floor's CPU time, and at least so many
times its plain way's speed; of packed at most so many ms of CPU, and so many times its plain way's speed."""

_LEAD = 8
"""Batches of a turn before the clock starts: more than any contestant holds ready."""

Storage = Literal["cache", "direct"]
STORAGE: tuple[Storage, ...] = ("cache", "direct")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a contest is held with: samples a batch, threads that read and as many that decode, and how."""

    batch_size: int
    threads: int
    storage: Storage

    def __str__(self) -> str:
        read = "page cache" if self.storage == "cache" else "O_DIRECT"
        return f"batch {self.batch_size}, {self.threads} threads, {read}"

    @property
    def config(self) -> LoaderConfig:
        """The loader's."""
        return LoaderConfig(self.batch_size, self.threads, direct_io=self.storage == "direct")


@dataclass(frozen=True, slots=True)
class Result:
    """A contestant: its figures, and how it stands to those that it is measured by.

    figures: see `harness.Summary`.
    bytes_read: from files, a sample.
    plain, limit: who stands for these, by name.
    cpu_of_floor, cpu_of_limit: its CPU time a sample over theirs, so below 1 is less.
    speed_of_plain: its samples a second over the plain way's, so above 1 is faster.
    cpu_saving: the plain way's CPU time a sample over its own, so above 1 is less.
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
    splits: dict[str, SampleDataset], forms: Sequence[str], setting: Setting, steps: int, rounds: int
) -> dict[str, Result]:
    """One contest of `forms` at `setting`: `rounds` rounds, `steps` batches a turn."""
    batch_size, threads, direct = setting.batch_size, setting.threads, setting.config.direct_io
    with contextlib.ExitStack() as stack:
        plain = {
            NPY_PLAIN: plain_loader(PlainNpy(splits["npy"]), splits["npy"], batch_size),
            GZIP_PLAIN: plain_loader(PlainGzip(splits[PUBLISHED]), splits[PUBLISHED], batch_size),
        }
        for batches in plain.values():
            stack.enter_context(contextlib.closing(batches))
            # Its workers start now, and import torch while nobody is timed.
            next(batches)
        of = {NPY_PLAIN: "npy", GZIP_PLAIN: PUBLISHED, FLOOR: "npy"}
        candidates = {}
        for format_name, device in itertools.product(forms, _devices()):
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
    """What a row of `format_name` is called."""
    return format_name if device == "cpu" else f"{format_name}, GPU"


def _devices() -> list[str]:
    return ["cpu", "cuda:0"] if torch.cuda.is_available() else ["cpu"]


def show(setting: Setting, results: dict[str, Result]) -> None:
    """Print the table, medians and 10th to 90th percentiles over the rounds, and how the bars are met."""
    print(setting)
    print(
        f"{'':22} {'samples/s':>17} {'CPU ms/sample':>16} {'MB read':>7} {'p50/p95/p99 ms':>17}"
        f" {'CPU/floor':>9} {'CPU/limit':>9} {'speed/plain':>16} {'plain CPU/own':>13}"
    )
    for name, result in results.items():
        figures = result.figures
        latency = "/".join(f"{value:.1f}" for value in figures.latency_ms)
        print(
            f"{name:22} {_text(figures.samples_per_s, 1):>17} {_text(figures.cpu_ms, 1):>16}"
            f" {result.bytes_read / 1e6:7.1f} {latency:>17}"
            f" {result.cpu_of_floor.median:9.2f} {result.cpu_of_limit.median:9.2f}"
            f" {_text(result.speed_of_plain, 1):>16} {result.cpu_saving.median:13.1f}"
        )
    print(f"floor: {FLOOR}; plain: {NPY_PLAIN} for npy, {GZIP_PLAIN} for the others; medians (p10-p90)")
    if setting.config.direct_io:
        print("the plain ways read from the page cache all the same, as one would write them first")
    for format_name, bars in TARGETS.items():
        if format_name not in results:
            continue
        for quantity, bar in bars.items():
            result = results[format_name]
            value = result.figures.cpu_ms if quantity == "cpu_ms" else getattr(result, quantity)
            most = "least" if quantity.startswith("speed") else "most"
            print(f"{format_name}, {quantity}: {value.median:.2f}; claimed of 128^3: at {most} {bar:g}")


def show_utilisation(found: dict[str, Utilisation], seconds: float) -> None:
    """Print how busy the emulated accelerators were kept."""
    for name, one in found.items():
        verdict = "passes" if min(one.each) >= PASSING else "does not pass"
        each = f" ({min(one.each):.1%} to {max(one.each):.1%})" if one.accelerators > 1 else ""
        print(
            f"{name:14} {one.accelerators} x {1e3 * seconds:g} ms a step: utilisation {one.mean:.1%}{each}, "
            f"{verdict} at {PASSING:.0%}; {one.samples_per_s:.0f} samples/s, {one.cpu_ms:.1f} ms CPU a sample"
        )


def _text(spread: harness.Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.p10:.{digits}f}-{spread.p90:.{digits}f})"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="where samples are kept (default: made, and removed)")
    parser.add_argument("--formats", type=_formats, default=list(FORMATS), help="of the loader, by commas")
    parser.add_argument("--samples", type=harness.positive, default=8, help="in the set")
    parser.add_argument("--steps", type=harness.positive, default=16, help="batches timed a turn")
    parser.add_argument("--size", type=int, default=128, choices=(32, 64, 128, 256), help="voxels an edge")
    parser.add_argument("--batch-size", type=harness.numbers, default=[1], help="by commas")
    parser.add_argument(
        "--threads", type=harness.numbers, default=[2], help="of the readers, and of the decoder"
    )
    parser.add_argument(
        "--storage", type=_storage, default=["cache"], help="cache, direct (O_DIRECT), or both"
    )
    parser.add_argument(
        "--rounds",
        type=harness.positive,
        default=7,
        help="turns of each contestant; with --emulate, one turn of four times as many batches in all",
    )
    parser.add_argument("--emulate", type=_seconds, help="h100, a100, or seconds of compute a step")
    parser.add_argument("--accelerators", type=harness.positive, default=1, help="that are emulated")
    parser.add_argument(
        "--output", type=Path, nargs="?", const=harness.RESULTS, help="write JSON (to benchmarks/results)"
    )
    options = parser.parse_args(argv)
    if options.samples < max(options.batch_size):
        parser.error(f"--samples {options.samples} do not fill one batch of {max(options.batch_size)}")
    return options


def _seconds(text: str) -> float:
    seconds = SECONDS.get(text) or float(text)
    if not 0.0 < seconds < 3600.0:
        raise argparse.ArgumentTypeError(f"{text} seconds are no step")
    return seconds


def _formats(text: str) -> list[str]:
    return harness.among(text, FORMATS)


def _storage(text: str) -> list[str]:
    return harness.among(text, STORAGE)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The command line; what was measured, by setting and contestant."""
    options = _options(argv)
    settings = [
        Setting(*each) for each in itertools.product(options.batch_size, options.threads, options.storage)
    ]
    with contextlib.ExitStack() as stack:
        root = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.emulate:
            splits = make_splits(root, options.formats, options.samples, options.size)
            return _emulate(splits, settings, options)
        # The plain ways, the floor and the limits read these, whichever formats are asked for.
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
