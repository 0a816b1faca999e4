"""The choice of the packed format's coding: how small, and how fast to undo, each candidate makes a sample.

    python benchmarks/codec_bench.py
    python benchmarks/codec_bench.py --data DIR --samples 8

A candidate is an arrangement of a sample's bytes, in blocks, and a compressor of blocks:

    counts    the int16 as they are, in one block
    bytes     their low bytes, then their high bytes
    table     a table of the sample's different voxels, and each one's row in it, as int16, in one block
    planes    the table, the commonest voxel first, and the rows' low and high bytes in blocks of so many KiB

The packed format is `planes 64 KiB, lz4hc-9`. Every candidate is checked to be lossless. One thread;
the time to float32 logarithms is that of inflating and of all that comes after it.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
import numpy.typing as npt
import zstandard
from zlib_ng import zlib_ng

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.samples import simulated
from pipelines.dataset.open import open_folder
from pipelines.formats.packed.encode import tabulate
from pipelines.loading.transforms import lookup_table
from pipelines.sample import Sample

_LOGS = lookup_table(apply_log=True)

Volume = npt.NDArray[np.float32]
Rebuild = Callable[[Sequence[bytes]], Volume]
Arrange = Callable[[Sample], tuple[list[bytes], Rebuild]]


@dataclass(frozen=True, slots=True)
class Compressor:
    """How a block is compressed, and inflated to a length that is known."""

    deflate: Callable[[bytes], bytes]
    inflate: Callable[[bytes, int], bytes]


def _lz4(**options: Any) -> Compressor:
    return Compressor(
        lambda block: lz4.block.compress(block, store_size=False, **options),
        lambda block, length: lz4.block.decompress(block, uncompressed_size=length),
    )


COMPRESSORS = {
    "none": Compressor(lambda block: block, lambda block, _: block),
    "zlib-6": Compressor(lambda block: zlib.compress(block, 6), lambda block, _: zlib_ng.decompress(block)),
    "lz4": _lz4(mode="default"),
    "lz4hc-9": _lz4(mode="high_compression", compression=9),
    "lz4hc-12": _lz4(mode="high_compression", compression=12),
    "zstd-3": Compressor(
        lambda block: zstandard.compress(block, 3),
        lambda block, length: zstandard.decompress(block, max_output_size=length),
    ),
}


def arrange_counts(sample: Sample) -> tuple[list[bytes], Rebuild]:
    """The int16 as they are."""
    shape = sample.counts.shape

    def rebuild(blocks: Sequence[bytes]) -> Volume:
        return np.take(_LOGS, np.frombuffer(blocks[0], np.int16).reshape(shape))

    return [sample.counts.tobytes()], rebuild


def arrange_bytes(sample: Sample) -> tuple[list[bytes], Rebuild]:
    """Low bytes, then high bytes."""
    shape = sample.counts.shape

    def rebuild(blocks: Sequence[bytes]) -> Volume:
        low, high = (np.frombuffer(block, np.uint8) for block in blocks)
        counts = np.left_shift(high, 8, dtype=np.uint16)
        counts |= low
        return np.take(_LOGS, counts.reshape(shape))

    halves = np.ascontiguousarray(sample.counts).view(np.uint8).reshape(-1, 2).T
    return [half.tobytes() for half in halves], rebuild


def arrange_table(sample: Sample) -> tuple[list[bytes], Rebuild]:
    """A table, sorted by its counts, and a row of it for each voxel."""
    shape = sample.counts.shape
    # The four redshifts of a voxel as one number.
    keys, rows = np.unique(np.ascontiguousarray(sample.counts).view(np.uint64).ravel(), return_inverse=True)
    table = keys[:, None].view(np.int16)
    kind = np.uint16 if len(table) <= 65536 else np.uint32

    def rebuild(blocks: Sequence[bytes]) -> Volume:
        values = np.take(_LOGS, np.frombuffer(blocks[0], np.int16).reshape(table.shape))
        return np.take(values, np.frombuffer(blocks[1], kind), axis=0).reshape(shape)

    return [table.tobytes(), rows.astype(kind).tobytes()], rebuild


def arrange_planes(kib: int) -> Arrange:
    """The table, the commonest first, and the rows' bytes in blocks of `kib` KiB."""

    def arrange(sample: Sample) -> tuple[list[bytes], Rebuild]:
        shape, voxels = sample.counts.shape, sample.counts.size // sample.counts.shape[-1]
        table, rows = tabulate(sample.counts)
        halves = np.ascontiguousarray(table).view(np.uint8).reshape(*table.shape, 2).transpose(2, 1, 0)
        planes = max(1, -(-(len(table) - 1).bit_length() // 8))
        chunk = min(kib << 10, voxels)
        all_bytes = rows.astype("<u4").view(np.uint8).reshape(voxels, 4)
        blocks = [
            all_bytes[start : start + chunk, plane].tobytes()
            for start in range(0, voxels, chunk)
            for plane in range(planes)
        ]

        def rebuild(found: Sequence[bytes]) -> Volume:
            half = np.frombuffer(found[0], np.uint8).reshape(2, table.shape[1], -1)
            counts = np.left_shift(half[1], 8, dtype=np.uint16) | half[0]
            values = np.ascontiguousarray(np.take(_LOGS, counts).T)
            out = np.empty((voxels, table.shape[1]), np.float32)
            for at, first in enumerate(range(1, len(found), planes)):
                index = np.frombuffer(found[first], np.uint8).astype(np.int64)
                for plane in range(1, planes):
                    block = np.frombuffer(found[first + plane], np.uint8)
                    index |= np.left_shift(block, 8 * plane, dtype=np.int64)
                part = out[at * chunk : at * chunk + len(index)]
                np.take(values, index, axis=0, out=part, mode="wrap")
            return out.reshape(shape)

        return [halves.tobytes(), *blocks], rebuild

    return arrange


CANDIDATES: dict[str, tuple[Arrange, str]] = {
    f"{name}, {compressor}": (arrange, compressor)
    for name, arrange, compressors in (
        ("counts", arrange_counts, ("none", "zlib-6", "lz4", "lz4hc-9", "zstd-3")),
        ("bytes", arrange_bytes, ("zlib-6", "lz4", "lz4hc-9", "zstd-3")),
        ("table", arrange_table, ("zlib-6", "lz4", "lz4hc-9", "zstd-3")),
        ("planes 16 KiB", arrange_planes(16), ("lz4hc-9",)),
        ("planes 32 KiB", arrange_planes(32), ("lz4hc-9",)),
        ("planes 64 KiB", arrange_planes(64), ("zlib-6", "lz4", "lz4hc-9", "lz4hc-12", "zstd-3")),
        ("planes 256 KiB", arrange_planes(256), ("lz4hc-9", "zstd-3")),
    )
    for compressor in compressors
}


@dataclass(frozen=True, slots=True)
class Result:
    """What became of the samples as one candidate: medians over samples and rounds, of one thread's CPU time.

    ratio: of the bytes of all samples' counts to what they became.
    pack_ms: to arrange and compress a sample. inflate_ms: to undo the compression. total_ms: to have
    float32 logarithms, inflating included.
    """

    ratio: float
    pack_ms: float
    inflate_ms: float
    total_ms: float


def measure(samples: Sequence[Sample], rounds: int) -> dict[str, Result]:
    """All candidates over `samples`, each undone `rounds` times; AssertionError if one is not lossless."""
    results = {}
    for name, (arrange, compressor) in CANDIDATES.items():
        way = COMPRESSORS[compressor]
        raw = packed = 0
        pack: list[float] = []
        inflate: list[float] = []
        total: list[float] = []
        for sample in samples:
            start = time.thread_time()
            blocks, rebuild = arrange(sample)
            deflated = [way.deflate(block) for block in blocks]
            pack.append(time.thread_time() - start)
            raw, packed = raw + sample.counts.nbytes, packed + sum(map(len, deflated))
            lengths = list(map(len, blocks))
            for _ in range(rounds):
                start = time.thread_time()
                inflated = list(map(way.inflate, deflated, lengths))
                inflate.append(time.thread_time() - start)
                volume = rebuild(inflated)
                total.append(time.thread_time() - start)
            assert np.array_equal(volume, np.take(_LOGS, sample.counts)), f"{name} is not lossless"
        medians = (1e3 * float(np.median(times)) for times in (pack, inflate, total))
        results[name] = Result(raw / packed, *medians)
    return results


def show(results: dict[str, Result]) -> None:
    """Print the table."""
    print(f"{'':26} {'ratio':>6} {'pack ms':>8} {'inflate ms':>10} {'to float32 ms':>13}")
    for name, result in results.items():
        print(
            f"{name:26} {result.ratio:6.2f} {result.pack_ms:8.0f} {result.inflate_ms:10.2f}"
            f" {result.total_ms:13.2f}"
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """The command line; what was measured, by candidate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of samples in any format (default: simulated)")
    parser.add_argument("--samples", type=harness.positive, default=3)
    parser.add_argument("--size", type=int, default=128, choices=(32, 64, 128, 256), help="of simulated ones")
    parser.add_argument("--rounds", type=harness.positive, default=5)
    parser.add_argument(
        "--output", type=Path, nargs="?", const=harness.RESULTS, help="write JSON (to benchmarks/results)"
    )
    options = parser.parse_args(argv)
    if options.data:
        split = open_folder(options.data)
        samples = [split.read(index) for index in range(min(options.samples, len(split)))]
    else:
        samples = [simulated(index, options.size) for index in range(options.samples)]
    results = measure(samples, options.rounds)
    show(results)
    if options.output:
        print("written to", harness.save("codec_bench", vars(options), results, options.output))
    return results


if __name__ == "__main__":
    main()
