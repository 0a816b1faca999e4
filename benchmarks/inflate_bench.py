"""Measure how fast a GPU decodes packed samples, by chunk length and batch size.

    python benchmarks/inflate_bench.py
    python benchmarks/inflate_bench.py --data DIR --chunk-kib 16,64,256 --batch-size 1,8

The loader's decoder turns packed bytes in host memory into float32 logarithms on the first GPU: copy,
decompression, gather. No files are read, and no training step runs at the same time. The packed format has
chunks of 64 KiB at 128^3, a choice that rests on this benchmark. `inflate_model.py` estimates the same
without a GPU.
"""

from __future__ import annotations

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
from benchmarks.samples import add_sample_options, chosen_samples
from pipelines.formats.packed.decode import open_packed
from pipelines.formats.packed.encode import encode
from pipelines.loading.config import LoaderConfig
from pipelines.loading.decoders import PackedGpuDecoder
from pipelines.sample import Sample, SampleSpec

_LEAD = 8
"""Warm-up batches."""


def measure(
    samples: Sequence[Sample], slices: int, batch_size: int, *, steps: int, rounds: int
) -> harness.Spread:
    """Return samples per second in `rounds` rounds of `steps` batches, with chunks of `slices` D-slices."""
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
    """Run the command line; return samples per second by chunk and batch size."""
    parser = harness.make_parser(__doc__)
    add_sample_options(parser)
    parser.add_argument("--chunk-kib", type=harness.numbers, default=[16, 32, 64, 128, 256], help="by commas")
    parser.add_argument("--batch-size", type=harness.numbers, default=[1, 2, 4, 8], help="by commas")
    parser.add_argument("--steps", type=harness.positive, default=50, help="batches timed a round")
    parser.add_argument("--rounds", type=harness.positive, default=5)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU")
    samples = chosen_samples(options)
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
