"""How fast a GPU makes volumes of packed samples, by the length of their chunks and by samples at a time.

    python benchmarks/inflate_bench.py
    python benchmarks/inflate_bench.py --data DIR --chunk-kib 16,64,256 --batch-size 1,8

From packed bytes in the host's memory to float32 logarithms on the first GPU, through the loader's own
decoder: copied, inflated, gathered. No files, and no step to hide behind. The packed format has chunks
of 64 KiB at 128^3; this is what has a say in that.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.samples import simulated
from pipelines.dataset.open import open_folder
from pipelines.formats.packed.decode import open_packed
from pipelines.formats.packed.encode import encode
from pipelines.loading.config import LoaderConfig
from pipelines.loading.decoders import PackedGpuDecoder
from pipelines.sample import Sample, SampleSpec

_LEAD = 8
"""Batches before the clock starts."""


def measure(
    samples: Sequence[Sample], slices: int, batch_size: int, *, steps: int, rounds: int
) -> harness.Spread:
    """Samples a second in `rounds` rounds of `steps` batches, with chunks of so many D-slices."""
    size, channels = samples[0].counts.shape[2:]
    spec, path = SampleSpec(size, channels), Path("a.packed")
    packed = [open_packed(path, b"".join(encode(sample, slices=slices)), spec) for sample in samples]
    endless = itertools.cycle(packed)
    decoder = PackedGpuDecoder(spec, LoaderConfig(batch_size), torch.device("cuda:0"))

    def submit() -> None:
        decoder.submit(list(itertools.islice(endless, batch_size)), np.zeros((1, batch_size), np.int64))

    def decode() -> None:
        submit()
        decoder.next(None)

    for _ in range(decoder.depth - 1):
        submit()
    rates = []
    for _ in range(_LEAD):
        decode()
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            decode()
        torch.cuda.synchronize()
        rates.append(steps * batch_size / (time.perf_counter() - start))
    return harness.Spread.of(rates)


def main(argv: Sequence[str] | None = None) -> dict[str, harness.Spread]:
    """The command line; samples a second, by chunk and batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of samples in any format (default: simulated)")
    parser.add_argument("--samples", type=harness.positive, default=3)
    parser.add_argument("--size", type=int, default=128, choices=(32, 64, 128, 256), help="of simulated ones")
    parser.add_argument("--chunk-kib", type=harness.numbers, default=[16, 32, 64, 128, 256], help="by commas")
    parser.add_argument("--batch-size", type=harness.numbers, default=[1, 2, 4, 8], help="by commas")
    parser.add_argument("--steps", type=harness.positive, default=50, help="batches timed a round")
    parser.add_argument("--rounds", type=harness.positive, default=5)
    parser.add_argument(
        "--output", type=Path, nargs="?", const=harness.RESULTS, help="write JSON (to benchmarks/results)"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here")
    if options.data:
        split = open_folder(options.data)
        samples = [split.read(index) for index in range(min(options.samples, len(split)))]
    else:
        samples = [simulated(index, options.size) for index in range(options.samples)]
    size, results = samples[0].counts.shape[0], {}
    for kib, batch_size in itertools.product(options.chunk_kib, options.batch_size):
        slices = max(1, min(size, (kib << 10) // size**2))
        if size % slices:
            parser.error(f"chunks of {kib} KiB are {slices} D-slices, which do not divide {size}")
        name = f"{slices * size**2 / 1024:g} KiB, batch {batch_size}"
        rate = measure(samples, slices, batch_size, steps=options.steps, rounds=options.rounds)
        results[name] = rate
        print(f"{name:22} {rate.median:8.0f} samples/s ({rate.p10:.0f}-{rate.p90:.0f})", flush=True)
    if options.output:
        print("written to", harness.save("inflate_bench", vars(options), results, options.output))
    return results


if __name__ == "__main__":
    main()
