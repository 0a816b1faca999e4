"""Measure what a rank reads and computes of samples that it shares with others.

    python benchmarks/slab_bench.py
    python benchmarks/slab_bench.py --ranks 2,4,8 --formats packed,packed_lz4 --output

One thread reads each rank's slab of each sample from the page cache and makes float32 logarithms of it, in
turns with whole samples. Bytes are those that the kernel counts for the thread (rchar of proc_pid_io(5)),
relative to all chunks or counts of the sample. Given apart is what every rank reads of a sample: headers,
directories, tables and targets. CPU time is relative to that of a whole sample.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.samples import KINDS, make_splits
from pipelines.dataset.dataset import SampleDataset
from pipelines.formats.packed.decode import PackedSample
from pipelines.loading.transforms import lookup_table
from pipelines.slab import Slab, shape_to_read
from pipelines.tables import format_table

IN_PART = tuple(kind for kind in KINDS if not kind.startswith("tfrecord"))

_MARGIN = 0.05
"""Target: a rank of S reads at most 1/S of a sample, two planes, and this part of it."""


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one format, number of ranks and kind of ends.

    Attributes:
        read: Mean part of a sample that a rank reads.
        most_read: Largest part, of all ranks and samples.
        target: Largest part that a rank should read.
        apart: Mean bytes of a sample that every rank reads.
        cpu: CPU time of a rank relative to that of a whole sample.
    """

    read: float
    most_read: float
    target: float
    apart: float
    cpu: harness.Spread


def run(split: SampleDataset, ranks: int, rounds: int, *, periodic: bool) -> Result:
    """Measure all slabs of all samples of `split` in `rounds` rounds."""
    table, slabs = lookup_table(apply_log=True), [Slab(rank, ranks, periodic) for rank in range(ranks)]
    outputs = {slab: np.empty(shape_to_read(split.spec, slab), np.float32) for slab in (None, *slabs)}
    parts, apart, ratios = [], [], []
    for _ in range(rounds):
        seconds = dict.fromkeys(outputs, 0.0)
        for index in range(len(split)):
            for slab, out in outputs.items():
                counted = [_bytes_read() for _ in range(2)]
                start = time.thread_time()
                payload = split.payload(index, slab=slab)
                # Counting reads a few bytes itself.
                read = _bytes_read() - 2 * counted[1] + counted[0]
                if isinstance(payload, PackedSample):
                    payload.fill(out, np.take(table, payload.table))
                    every = payload.header.chunks_start
                    own = int(split.member_extents[index]["bytes"]) - every
                else:
                    # Whole samples are mapped, and read only here.
                    np.take(table, payload.counts, out=out, mode="clip")
                    own, label = split.spec.bytes, split.files(index)[0]
                    every = sum(split.storage.state(path).bytes for path in (split.path(index), label)) - own
                seconds[slab] += time.thread_time() - start
                if slab is not None:
                    parts.append((read - every) / own)
                    apart.append(every)
        ratios += [seconds[slab] / seconds[None] for slab in slabs]
    target = 1 / ranks + 2 / split.spec.size + _MARGIN
    return Result(float(np.mean(parts)), max(parts), target, float(np.mean(apart)), harness.Spread.of(ratios))


def _bytes_read() -> int:
    """Return the bytes that this thread has read so far."""
    return int(Path("/proc/thread-self/io").read_bytes().split()[1])


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Run the command line; return the results."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--formats", type=lambda text: harness.among(text, IN_PART), default=[*IN_PART])
    parser.add_argument("--ranks", type=harness.numbers, default=[2, 4], help="that share a sample")
    parser.add_argument("--samples", type=harness.positive, default=4)
    parser.add_argument("--size", type=int, default=128, help="voxels along an edge")
    parser.add_argument("--rounds", type=harness.positive, default=3)
    parser.add_argument("--root", type=Path, help="folder that keeps the samples (default: none is kept)")
    options = parser.parse_args(argv)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        splits = make_splits(options.root or Path(scratch), options.formats, options.samples, options.size)
        for kind, split in splits.items():
            for ranks in options.ranks:
                for periodic in (False, True):
                    name = f"{kind}, {ranks} ranks, {'periodic' if periodic else 'zeros'}"
                    results[name] = run(split, ranks, options.rounds, periodic=periodic)
    rows: list[Sequence[str]] = [("of a sample", "read", "most", "target", "bytes apart", "CPU of whole")]
    for name, one in results.items():
        read = (f"{part:.3f}" for part in (one.read, one.most_read, one.target))
        rows.append((name, *read, f"{one.apart:,.0f}", one.cpu.text(2)))
    print(format_table(rows))
    if options.output:
        print("written to", harness.save("slab_bench", vars(options), results, options.output))
    return results


if __name__ == "__main__":
    main()
