"""Compare codings for the packed format by the size of a sample and the time to decode it.

    python benchmarks/codec_bench.py
    python benchmarks/codec_bench.py --data DIR --samples 8

A candidate is an arrangement of a sample's bytes in blocks, and a compressor of blocks:

    counts    the int16 unchanged, in one block
    bytes     their low bytes, then their high bytes
    table     a table of the sample's different voxels, and the row of each voxel, as int16, in one block
    planes    the table, most frequent voxel first, and low and high bytes of the rows in blocks of some KiB
    packed    the packed format: as `planes`, but a byte for each of the 255 most frequent rows, and escapes

Version 2 of the packed format was `planes 64 KiB, lz4hc-9`. Each candidate is checked to be lossless. All
runs in one thread; the time to float32 logarithms includes decompression and all later work. For the packed
format that is the loader's own code, with gather.c if it is compiled, and decompression is not timed apart.
"""

from __future__ import annotations

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
from benchmarks.samples import add_sample_options, chosen_samples
from pipelines.formats.packed.decode import open_packed
from pipelines.formats.packed.distinct import tabulate
from pipelines.formats.packed.encode import PRESETS, encode
from pipelines.loading.transforms import lookup_table
from pipelines.sample import Sample
from pipelines.tables import format_table

_LOGS = lookup_table(apply_log=True)

Volume = npt.NDArray[np.float32]
Rebuild = Callable[[Sequence[bytes]], Volume]
Arrange = Callable[[Sample], tuple[list[bytes], Rebuild]]


@dataclass(frozen=True, slots=True)
class Compressor:
    """Functions that compress a block, and decompress it to a known length."""

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
    """Arrange the int16 unchanged."""
    shape = sample.counts.shape

    def rebuild(blocks: Sequence[bytes]) -> Volume:
        return np.take(_LOGS, np.frombuffer(blocks[0], np.int16).reshape(shape))

    return [sample.counts.tobytes()], rebuild


def arrange_bytes(sample: Sample) -> tuple[list[bytes], Rebuild]:
    """Arrange low bytes, then high bytes."""
    shape = sample.counts.shape

    def rebuild(blocks: Sequence[bytes]) -> Volume:
        low, high = (np.frombuffer(block, np.uint8) for block in blocks)
        counts = np.left_shift(high, 8, dtype=np.uint16)
        counts |= low
        return np.take(_LOGS, counts.reshape(shape))

    halves = np.ascontiguousarray(sample.counts).view(np.uint8).reshape(-1, 2).T
    return [half.tobytes() for half in halves], rebuild


def arrange_table(sample: Sample) -> tuple[list[bytes], Rebuild]:
    """Arrange a table, sorted by counts, and the row of each voxel."""
    shape = sample.counts.shape
    # The four redshifts of a voxel as one integer.
    keys, rows = np.unique(np.ascontiguousarray(sample.counts).view(np.uint64).ravel(), return_inverse=True)
    table = keys[:, None].view(np.int16)
    kind = np.uint16 if len(table) <= 65536 else np.uint32

    def rebuild(blocks: Sequence[bytes]) -> Volume:
        values = np.take(_LOGS, np.frombuffer(blocks[0], np.int16).reshape(table.shape))
        return np.take(values, np.frombuffer(blocks[1], kind), axis=0).reshape(shape)

    return [table.tobytes(), rows.astype(kind).tobytes()], rebuild


def arrange_planes(kib: int) -> Arrange:
    """Return an arrangement of the table, most frequent first, and the rows' bytes in `kib` KiB."""

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


def arrange_packed(preset: str) -> Arrange:
    """Return an arrangement as a packed sample of `preset`."""

    def arrange(sample: Sample) -> tuple[list[bytes], Rebuild]:
        def rebuild(found: Sequence[bytes]) -> Volume:
            packed = open_packed(Path("a.packed"), found[0])
            packed.verify_checksum()
            volume = np.empty(sample.counts.shape, np.float32)
            packed.fill(volume, np.take(_LOGS, packed.table))
            return volume

        return [b"".join(encode(sample, preset))], rebuild

    return arrange


CANDIDATES: dict[str, tuple[Arrange, str]] = {
    f"{name}, {compressor}": (arrange, compressor)
    for name, arrange, compressors in (
        ("counts", arrange_counts, ("none", "zlib-6", "lz4", "lz4hc-9", "zstd-3")),
        ("bytes", arrange_bytes, ("zlib-6", "lz4", "lz4hc-9", "zstd-3")),
        ("table", arrange_table, ("zlib-6", "lz4", "lz4hc-9", "zstd-3")),
        ("planes 16 KiB", arrange_planes(16), ("lz4hc-9",)),
        ("planes 64 KiB", arrange_planes(64), ("zlib-6", "lz4", "lz4hc-9", "lz4hc-12", "zstd-3")),
        ("planes 256 KiB", arrange_planes(256), ("lz4hc-9", "zstd-3")),
    )
    for compressor in compressors
} | {f"packed, {preset}": (arrange_packed(preset), "none") for preset in PRESETS}


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one candidate: medians of a thread's CPU time over samples and rounds.

    Attributes:
        ratio: Bytes of all samples' counts relative to the coded ones.
        pack_ms: Time to arrange and compress a sample.
        inflate_ms: Time to decompress it.
        total_ms: Time to float32 logarithms, including decompression.
    """

    ratio: float
    pack_ms: float
    inflate_ms: float
    total_ms: float


def measure(samples: Sequence[Sample], rounds: int) -> dict[str, Result]:
    """Measure all candidates on `samples`, decoding each `rounds` times; assert that they are lossless."""
    results = {}
    for name, (arrange, compressor) in CANDIDATES.items():
        backend = COMPRESSORS[compressor]
        raw = packed = 0
        pack: list[float] = []
        inflate: list[float] = []
        total: list[float] = []
        for sample in samples:
            start = time.thread_time()
            blocks, rebuild = arrange(sample)
            deflated = [backend.deflate(block) for block in blocks]
            pack.append(time.thread_time() - start)
            raw, packed = raw + sample.counts.nbytes, packed + sum(map(len, deflated))
            lengths = list(map(len, blocks))
            for _ in range(rounds):
                start = time.thread_time()
                inflated = list(map(backend.inflate, deflated, lengths))
                inflate.append(time.thread_time() - start)
                volume = rebuild(inflated)
                total.append(time.thread_time() - start)
            assert np.array_equal(volume, np.take(_LOGS, sample.counts)), f"{name} is not lossless"
        medians = (1e3 * float(np.median(times)) for times in (pack, inflate, total))
        results[name] = Result(raw / packed, *medians)
    return results


def show(results: dict[str, Result]) -> None:
    """Print the table."""
    rows = [["", "ratio", "pack ms", "inflate ms", "to float32 ms"]]
    for name, each in results.items():
        times = (f"{value:.2f}" for value in (each.inflate_ms, each.total_ms))
        rows.append([name, f"{each.ratio:.2f}", f"{each.pack_ms:.0f}", *times])
    print(format_table(rows))


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Run the command line; return the result of each candidate."""
    parser = harness.make_parser(__doc__)
    add_sample_options(parser)
    parser.add_argument("--rounds", type=harness.positive, default=5)
    options = parser.parse_args(argv)
    samples = chosen_samples(options)
    results = measure(samples, options.rounds)
    show(results)
    if options.output:
        print("written to", harness.save("codec_bench", vars(options), results, options.output))
    return results


if __name__ == "__main__":
    main()
