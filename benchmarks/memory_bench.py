"""Measure the memory of the programs that make, convert and check large samples.

    python benchmarks/memory_bench.py --size 256

Four universes are simulated as gzip TFRecords, converted to packed samples and to .npy files, and verified.
Two are stored as HDF5 files, and prepared whole. Memory is the resident memory of a program and its worker
processes, polled every 20 ms; a page that several processes map counts in each.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from pipelines.dataset.open import open_folder
from pipelines.sample import SampleSpec
from preprocess.conversion.hdf5_task import COUNTS, TARGET
from preprocess.simulator.universe import SIZES

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 16e9
"""Target for all processes of each program together at 256^3 with two workers, in bytes."""

_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak memory of a program.

    Attributes:
        tree: Bytes of all its processes together.
        process: Bytes of the largest one.
        seconds: Wall time.
    """

    tree: int
    process: int
    seconds: float


def measure(module: str, *arguments: object) -> Peak:
    """Run `python -m module arguments` and return its peak memory."""
    line = [sys.executable, "-m", module, *map(str, arguments)]
    start, tree, process = time.perf_counter(), 0, 0
    running = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL)
    while running.poll() is None:
        resident = [_resident(pid) for pid in (running.pid, *harness.descendants(running.pid))]
        tree, process = max(tree, sum(resident)), max(process, *resident)
        time.sleep(_POLL)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, line)
    return Peak(tree, process, time.perf_counter() - start)


def _resident(pid: int) -> int:
    """Return the resident memory of process `pid` in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def run(root: Path, size: int, workers: int) -> dict[str, Peak]:
    """Measure each program in `root` on universes of `size`^3; return the peaks by what was done."""
    each = ("--workers", workers)
    made, hdf5 = root / "made", root / "hdf5"
    peaks = {
        "simulate": measure(
            "preprocess.simulate", "-o", made, "--train", 2, "--validation", 2, "--size", size, *each
        )
    }
    for source, to in (("made", "packed"), ("made", "npy"), ("npy", "packed"), ("npy", "tfrecord_gzip")):
        target = root / (to if to != "packed" or source == "made" else "again")
        peaks[f"{'tfrecord_gzip' if source == 'made' else source} to {to}"] = measure(
            "preprocess.convert", "-i", root / source, "-o", target, "--to", to, *each
        )
    for folder in ("packed", "npy", "made"):
        peaks[f"verify {'tfrecord_gzip' if folder == 'made' else folder}"] = measure(
            "preprocess.verify", root / folder, *each
        )
    hdf5.mkdir()
    for number, split in enumerate(("train", "validation")):
        sample = open_folder(root / "npy" / split).read(0)
        with h5py.File(hdf5 / f"universe_{number}.hdf5", "w") as file:
            file[COUNTS], file[TARGET] = sample.counts, sample.target
    for to in ("packed", "tfrecord_gzip"):
        options = ("--sample-size", size, "--validation", 0.5, "--to", to)
        peaks[f"HDF5 to {to}"] = measure(
            "preprocess.prepare", "-i", hdf5, "-o", root / f"whole_{to}", *options, *each
        )
    return peaks


def main(argv: Sequence[str] | None = None) -> dict[str, Peak]:
    """Run the command line; return the results."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--size", type=int, default=256, choices=SIZES, help="voxels along an edge")
    parser.add_argument("--workers", type=harness.positive, default=2, help="processes of each program")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        peaks = run(Path(root), options.size, options.workers)
    sample = SampleSpec(options.size).bytes
    print(f"a sample of {options.size}^3 has {sample / 1e6:.0f} MB; {options.workers} worker processes")
    for name, peak in peaks.items():
        sizes = f"all processes {peak.tree / 1e9:6.2f} GB, largest {peak.process / 1e9:6.2f} GB"
        print(f"{name:24} {sizes} ({peak.process / sample:5.1f} samples), {peak.seconds:6.1f} s")
    print(f"target at 256^3: at most {LIMIT / 1e9:.0f} GB for all processes")
    if options.output:
        record = {"bars": {"tree": LIMIT}, "sample_bytes": sample, "measured": peaks}
        print("written to", harness.save("memory_bench", vars(options), record, options.output))
    return peaks


if __name__ == "__main__":
    main()
