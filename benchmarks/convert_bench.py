"""Conversion alone: what it costs to make .npy files of gzip TFRecords.

    python benchmarks/convert_bench.py

`python -m preprocess.convert` as a user starts it takes turns with what one would write first: a
loop over Python's gzip, np.frombuffer and np.save, in one process. Both convert a few files and many;
the difference is what a file costs, and the rest is the start-up. Files are compressed at zlib's
level 6, as published, and lie in the page cache; what is written goes to the disk of the temporary
folder. The plain way checks no record's CRC, and does not wait for the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.samples import compressed, simulated
from pipelines.formats.tf_example import encode_example
from pipelines.formats.tfrecord import frame

TARGETS = {"cpu_ms": 40.0, "cpu_saving": 3.0, "speed": 5.0}
"""What the project claims of 128^3 on two cores: at most so many ms of CPU a file, so many times less than
the plain way, and so many times as fast on the clock."""

PROJECT, PLAIN = "preprocess.convert", "plain Python"

_UNLIKE = 8
"""Samples that differ; the others are copies, which cost as much."""


@dataclass(frozen=True, slots=True)
class Results:
    """What was measured.

    cpu_ms, wall_ms: a file, by contestant.
    start_cpu_ms, start_wall_ms: before the first file, by contestant.
    cpu_saving, speed: the plain way's CPU and clock time over the project's.
    peak_memory: the most bytes that one of the project's processes had resident, by number of files.
    """

    cpu_ms: dict[str, harness.Spread]
    wall_ms: dict[str, harness.Spread]
    start_cpu_ms: dict[str, harness.Spread]
    start_wall_ms: dict[str, harness.Spread]
    cpu_saving: harness.Spread
    speed: harness.Spread
    peak_memory: dict[int, int]


def make_source(folder: Path, files: int, size: int) -> Path:
    """`files` gzip TFRecords of `size`^3 in `folder`, in the page cache."""
    folder.mkdir(parents=True)
    for index in range(files):
        path = folder / f"universe_{index:05d}.tfrecord"
        if index < _UNLIKE:
            path.write_bytes(compressed(simulated(index, size)))
        else:
            shutil.copyfile(folder / f"universe_{index % _UNLIKE:05d}.tfrecord", path)
    return folder


def project_converter(source: Path, target: Path) -> None:
    """The project's converter, as a user starts it."""
    subprocess.run(_command(source, target), check=True, stdout=subprocess.DEVNULL)


def plain(source: Path, target: Path, size: int) -> None:
    """What one would write first, knowing where in the record the counts are."""
    sample = simulated(0, size)
    start = frame(encode_example(sample)).index(sample.counts.tobytes())
    target.mkdir()
    for path in sorted(source.iterdir()):
        with gzip.open(path) as file:
            content = file.read()
        counts = np.frombuffer(content, np.int16, sample.counts.size, start).reshape(sample.counts.shape)
        np.save(target / path.name.replace(".tfrecord", "_data.npy"), counts)


def measure(work: Callable[[], None]) -> harness.Reading:
    """Seconds that `work` takes, on the clock and on all processors, its processes included."""
    wall, cpu = time.perf_counter(), harness.cpu_seconds()
    work()
    return harness.Reading(time.perf_counter() - wall, harness.cpu_seconds() - cpu)


def peak_memory(source: Path, target: Path) -> int:
    """The most memory, in bytes, that one of the converter's processes had resident."""
    # A process of its own, so that its children are the converter's alone.
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    line = [sys.executable, "-c", code, *_command(source, target)]
    return 1024 * int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def _command(source: Path, target: Path) -> list[str]:
    line = [sys.executable, "-m", "preprocess.convert", "-i", str(source), "-o", str(target), "--to", "npy"]
    return ["env", f"PYTHONPATH={Path(__file__).resolve().parent.parent}", *line]


def run(root: Path, files: int, size: int, rounds: int) -> Results:
    """The contest in `root` over `files` files and an eighth of them."""
    few = max(files // 8, 1)
    sources = {count: make_source(root / f"source{count}", count, size) for count in (few, files)}
    candidates: dict[str, Callable[[Path, Path], None]] = {
        PROJECT: project_converter,
        PLAIN: functools.partial(plain, size=size),
    }
    a_file: dict[str, list[harness.Reading]] = {name: [] for name in candidates}
    start: dict[str, list[harness.Reading]] = {name: [] for name in candidates}
    for warm in [False] + [True] * rounds:
        for name, work in candidates.items():
            taken = []
            for source in sources.values():
                taken.append(measure(functools.partial(work, source, root / "target")))
                shutil.rmtree(root / "target")
            if warm:
                less, more = taken
                wall, cpu = ((b - a) / (files - few) for a, b in zip(_pair(less), _pair(more), strict=True))
                a_file[name].append(harness.Reading(wall, cpu))
                start[name].append(harness.Reading(less.wall - few * wall, less.cpu - few * cpu))
    return Results(
        cpu_ms=_milliseconds(a_file, "cpu"),
        wall_ms=_milliseconds(a_file, "wall"),
        start_cpu_ms=_milliseconds(start, "cpu"),
        start_wall_ms=_milliseconds(start, "wall"),
        cpu_saving=harness.ratio(a_file[PLAIN], a_file[PROJECT], "cpu"),
        speed=harness.ratio(a_file[PLAIN], a_file[PROJECT], "wall"),
        peak_memory={count: peak_memory(source, root / f"to{count}") for count, source in sources.items()},
    )


def _pair(reading: harness.Reading) -> tuple[float, float]:
    return reading.wall, reading.cpu


def _milliseconds(
    readings: Mapping[str, list[harness.Reading]], quantity: Literal["wall", "cpu"]
) -> dict[str, harness.Spread]:
    return {
        name: harness.Spread.of(1e3 * getattr(reading, quantity) for reading in each)
        for name, each in readings.items()
    }


def show(results: Results) -> None:
    """Print the figures, and how the bars are met."""
    for quantity, a_file, once in (
        ("CPU ms", results.cpu_ms, results.start_cpu_ms),
        ("ms", results.wall_ms, results.start_wall_ms),
    ):
        for name in (PROJECT, PLAIN):
            print(f"{name:19} {quantity:>6} a file {_text(a_file[name])}, and {_text(once[name])} once")
    print(f"claimed of 128^3: at most {TARGETS['cpu_ms']} ms of CPU")
    print(f"CPU, plain / own {_text(results.cpu_saving)}; claimed of 128^3: at least {TARGETS['cpu_saving']}")
    print(f"clock, plain / own {_text(results.speed)}; claimed of 128^3: at least {TARGETS['speed']}")
    for files, peak in results.peak_memory.items():
        print(f"peak memory of a process over {files} files: {peak / 1e6:.0f} MB")


def _text(spread: harness.Spread) -> str:
    return f"{spread.median:.1f} ({spread.p10:.1f}-{spread.p90:.1f})"


def main(argv: Sequence[str] | None = None) -> Results:
    """The command line; what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=192)
    parser.add_argument("--size", type=int, default=128, help="voxels along an edge")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument(
        "--output", type=Path, nargs="?", const=harness.RESULTS, help="write JSON (to benchmarks/results)"
    )
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = run(root, options.files, options.size, options.rounds)
    show(results)
    if options.output:
        record: Mapping[str, object] = {"bars": TARGETS, "measured": results}
        print("written to", harness.save("convert_bench", vars(options), record, options.output))
    return results


if __name__ == "__main__":
    main()
