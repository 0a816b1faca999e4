"""Measure how fast a GPU decodes packed samples, by where they are inflated, chunk length and batch size.

    python benchmarks/inflate_bench.py
    python benchmarks/inflate_bench.py --data DIR --chunk-kib 16,64,256 --batch-size 1,8

The loader's decoder turns packed bytes in host memory into float32 logarithms on the first GPU: copy,
decompression, gather. No files are read, and no training step runs at the same time. LZ4 is inflated by the
GPU, in chunks of each length; Zstandard, the preset `fast`, by one thread of the host. `inflate_model.py`
estimates the former without a GPU.
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
from pipelines.formats.packed.codecs import Codec
from pipelines.formats.packed.decode import open_packed
from pipelines.formats.packed.encode import encode
from pipelines.loading.config import LoaderConfig
from pipelines.loading.packed_decoders import PackedGpuDecoder
from pipelines.sample import Sample, SampleSpec

_LEAD = 8
"""Warm-up batches."""


def measure(
    samples: Sequence[Sample], chunk_kib: int | None, batch_size: int, *, steps: int, rounds: int
) -> harness.Spread:
    """Return samples per second in `rounds` rounds of `steps` batches.

    Args:
        chunk_kib: Length of the chunks that the GPU inflates; None to inflate on the host.
    """
    size, channels = samples[0].counts.shape[2:]
    spec, path = SampleSpec(size, channels), Path("a.packed")
    packed = [
        open_packed(
            path,
            b"".join(encode(sample, "lz4", chunk_voxels=chunk_kib << 10) if chunk_kib else encode(sample)),
            spec,
        )
        for sample in samples
    ]
    endless = itertools.cycle(packed)
    codec = Codec.LZ4 if chunk_kib else Codec.STORED
    decoder = PackedGpuDecoder(spec.shape, LoaderConfig(batch_size), torch.device("cuda:0"), codec)

    def submit() -> None:
        batch = list(itertools.islice(endless, batch_size))
        for payload, on_read in zip(batch, decoder.reserve(), strict=True):
            on_read(payload)
        decoder.submit(batch, np.zeros((1, batch_size), np.int64))

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
    parser.add_argument("--chunk-kib", type=harness.numbers, default=[8, 16, 32, 64], help="by commas")
    parser.add_argument("--batch-size", type=harness.numbers, default=[1, 2, 4, 8], help="by commas")
    parser.add_argument("--steps", type=harness.positive, default=50, help="batches timed a round")
    parser.add_argument("--rounds", type=harness.positive, default=5)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU")
    samples = chosen_samples(options)
    results = {}
    for kib, batch_size in itertools.product([*options.chunk_kib, None], options.batch_size):
        name = f"{f'{kib} KiB' if kib else 'host'}, batch {batch_size}"
        rate = measure(samples, kib, batch_size, steps=options.steps, rounds=options.rounds)
        results[name] = rate
        print(f"{name:22} {rate.median:8.0f} samples/s ({rate.p10:.0f}-{rate.p90:.0f})", flush=True)
    if options.output:
        print("written to", harness.save("inflate_bench", vars(options), results, options.output))
    return results


if __name__ == "__main__":
    main()
