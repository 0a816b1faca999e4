"""Measure the conversion of gzip TFRecords to .npy files, or to another format.

    python benchmarks/convert_bench.py
    python benchmarks/convert_bench.py --to packed

`python -m preprocess.convert` takes turns with a straightforward program: a loop over Python's gzip,
np.frombuffer and np.save in one process, whatever the format. Both convert few and many files; the
difference is the cost of a file, and the rest is the start-up. Files are compressed at zlib's level 6, as
published, and are in the page cache; the output goes to the disk of the temporary folder. The
straightforward program checks no CRC and does not wait for the disk.
"""

from __future__ import annotations

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
from benchmarks.samples import compressed, framed, simulated
from pipelines.formats.registry import FORMATS

TARGETS = {"cpu_ms": 40.0, "packed_cpu_ms": 90.0, "cpu_saving": 3.0, "speed": 5.0}
"""Targets for 128^3 on two cores: maximum CPU time in ms per file to .npy and to packed, and for .npy minimum
ratios of the plain program's CPU and wall time to the project's."""

PROJECT, PLAIN = "preprocess.convert", "plain Python"

_DIFFERENT = 8
"""Number of different samples; the others are copies, which cost the same."""

_SHARD = "8"
"""Samples of a shard, where the format has shards, so that all workers are busy."""


@dataclass(frozen=True, slots=True)
class Results:
    """Measured figures.

    Attributes:
        cpu_ms, wall_ms: Per file, by candidate.
        start_cpu_ms, start_wall_ms: Before the first file, by candidate.
        cpu_saving, speed: CPU and wall time of the plain program relative to the project's.
        peak_memory: Largest resident memory of a process of the project in bytes, by number of files.
    """

    cpu_ms: dict[str, harness.Spread]
    wall_ms: dict[str, harness.Spread]
    start_cpu_ms: dict[str, harness.Spread]
    start_wall_ms: dict[str, harness.Spread]
    cpu_saving: harness.Spread
    speed: harness.Spread
    peak_memory: dict[int, int]


def make_source(folder: Path, files: int, size: int) -> Path:
    """Write `files` gzip TFRecords of `size`^3 to `folder`; they stay in the page cache."""
    folder.mkdir(parents=True)
    for index in range(files):
        path = folder / f"universe_{index:05d}.tfrecord"
        if index < _DIFFERENT:
            path.write_bytes(compressed(simulated(index, size)))
        else:
            shutil.copyfile(folder / f"universe_{index % _DIFFERENT:05d}.tfrecord", path)
    return folder


def project_converter(source: Path, target: Path, to: str) -> None:
    """Run the project's converter as a user does."""
    subprocess.run(_command(source, target, to), check=True, stdout=subprocess.DEVNULL)


def plain(source: Path, target: Path, size: int) -> None:
    """Convert in a straightforward loop, with a known offset of the counts in the record."""
    sample = simulated(0, size)
    start = framed(sample).index(sample.counts.tobytes())
    target.mkdir()
    for path in sorted(source.iterdir()):
        with gzip.open(path) as file:
            content = file.read()
        counts = np.frombuffer(content, np.int16, sample.counts.size, start).reshape(sample.counts.shape)
        np.save(target / path.name.replace(".tfrecord", "_data.npy"), counts)


def measure(work: Callable[[], None]) -> harness.Reading:
    """Return the wall and CPU time of `work` in seconds, including its processes."""
    wall, cpu = time.perf_counter(), harness.cpu_seconds()
    work()
    return harness.Reading(time.perf_counter() - wall, harness.cpu_seconds() - cpu)


def peak_memory(source: Path, target: Path, to: str) -> int:
    """Return the largest resident memory, in bytes, of a process of the converter."""
    # In a separate process, whose only children are the converter's.
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    line = [sys.executable, "-c", code, *_command(source, target, to)]
    return 1024 * int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def _command(source: Path, target: Path, to: str) -> list[str]:
    line = [sys.executable, "-m", "preprocess.convert", "-i", str(source), "-o", str(target), "--to", to]
    path = f"PYTHONPATH={Path(__file__).resolve().parent.parent}"
    return ["env", path, *line, "--samples-per-shard", _SHARD]


def run(root: Path, files: int, size: int, rounds: int, to: str) -> Results:
    """Compare the candidates in `root` on `files` files and an eighth of them."""
    few = max(files // 8, 1)
    sources = {count: make_source(root / f"source{count}", count, size) for count in (few, files)}
    candidates: dict[str, Callable[[Path, Path], None]] = {
        PROJECT: functools.partial(project_converter, to=to),
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
        peak_memory={
            count: peak_memory(source, root / f"to{count}", to) for count, source in sources.items()
        },
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


def show(results: Results, to: str) -> None:
    """Print the figures of the conversion to the format `to`, and its targets."""
    for quantity, a_file, once in (
        ("CPU ms", results.cpu_ms, results.start_cpu_ms),
        ("ms", results.wall_ms, results.start_wall_ms),
    ):
        for name in (PROJECT, PLAIN):
            print(f"{name:19} {quantity:>6} per file {a_file[name].text(1)}, start-up {once[name].text(1)}")
    limit = TARGETS.get("cpu_ms" if to == "npy" else f"{to}_cpu_ms")
    print(f"CPU ms per file; target at 128^3: {f'at most {limit}' if limit else 'none'}")
    saving, speed = (f"at least {TARGETS[key]}" if to == "npy" else "none" for key in ("cpu_saving", "speed"))
    print(f"CPU, plain / own {results.cpu_saving.text(1)}; target at 128^3: {saving}")
    print(f"wall, plain / own {results.speed.text(1)}; target at 128^3: {speed}")
    for files, peak in results.peak_memory.items():
        print(f"peak memory of a process over {files} files: {peak / 1e6:.0f} MB")


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the command line; return the results."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--to", default="npy", choices=sorted(FORMATS), help="format to convert to")
    parser.add_argument("--files", type=int, default=192)
    parser.add_argument("--size", type=int, default=128, help="voxels along an edge")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = run(root, options.files, options.size, options.rounds, options.to)
    show(results, options.to)
    if options.output:
        record: Mapping[str, object] = {"bars": TARGETS, "measured": results}
        print("written to", harness.save("convert_bench", vars(options), record, options.output))
    return results


if __name__ == "__main__":
    main()
