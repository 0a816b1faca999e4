"""Model how fast a GPU inflates packed samples, by chunk length and batch size.

    python benchmarks/inflate_model.py
    python benchmarks/inflate_model.py --data DIR --output

nvCOMP decodes the LZ4 block of a chunk in one warp, one sequence (literals and a match) after the other. DALI
passes it the blocks of all samples of a batch in one call, and runs one batch at a time on the GPU. So the
longest block of a batch sets its time, until the warps of a scheduler together issue more instructions than
that time allows. The sequences are counted in real blocks; their time is an assumption, given as a range.
`inflate_bench.py` measures the same on a GPU; the two have not been compared.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.samples import add_sample_options, chosen_samples
from benchmarks.step_model import CHIPS, Chip
from pipelines.formats.packed.decode import open_packed
from pipelines.formats.packed.encode import encode
from pipelines.sample import Sample
from pipelines.tables import format_table

LENGTHS = 64, 32, 16, 8, 4
"""Chunk lengths in Ki voxels, so in KiB; the first is the one that sizes are compared with."""

BATCHES = 1, 2, 4, 8

SEQUENCE = 0.3e-6, 0.8e-6
"""Seconds of a sequence in a warp that runs alone: two to five accesses to L2 in turn, of 270 cycles each."""

_INSTRUCTIONS = 150
"""Instructions of a sequence, of which a scheduler issues one a cycle."""

_SCHEDULERS, _RESIDENT = 4, 16
"""Schedulers of a multiprocessor, and warps that each holds: nvCOMP's blocks have two warps, of 32 blocks."""

_OVERHEAD = 50e-6
"""Seconds a batch for allocation and launches."""


@dataclass(frozen=True)
class Chunks:
    """The LZ4 blocks of a sample for one chunk length.

    Attributes:
        blocks: Their number: those of the symbols, which a GPU inflates.
        longest: Most sequences of a block.
        bytes: Of the whole sample.
    """

    blocks: int
    longest: int
    bytes: int


def count_sequences(block: bytes) -> int:
    """Return the sequences of an LZ4 block."""

    def skip_length(start: int, nibble: int) -> tuple[int, int]:
        """Return a length, and the position after the bytes that continue it."""
        length = nibble
        while nibble == 15:
            length += block[start]
            start += 1
            if block[start - 1] < 255:
                break
        return length, start

    position = count = 0
    while position < len(block):
        token = block[position]
        literals, position = skip_length(position + 1, token >> 4)
        position += literals
        count += 1
        # The last sequence has no match.
        if position < len(block):
            _, position = skip_length(position + 2, token & 15)
    return count


def cut(sample: Sample, length: int) -> Chunks:
    """Return the blocks of `sample`, packed with the preset lz4 in chunks of `length` voxels."""
    content = b"".join(encode(sample, "lz4", chunk_voxels=length))
    chunks = open_packed(Path("a.packed"), content).chunks
    starts, sizes = chunks.starts[:, 0].tolist(), chunks.sizes[:, 0].tolist()
    blocks = [content[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return Chunks(len(blocks), max(map(count_sequences, blocks)), len(content))


def batch_seconds(chunks: Chunks, batch: int, sequence: float, chip: Chip) -> float:
    """Return the seconds for `batch` samples of `chunks`, if a sequence alone takes `sequence` seconds."""
    warps = math.ceil(batch * chunks.blocks / (chip.multiprocessors * _SCHEDULERS))
    full, rest = divmod(warps, _RESIDENT)
    rounds = [_RESIDENT] * full + [rest] * (rest > 0)
    each = [max(sequence, resident * _INSTRUCTIONS / chip.clock) for resident in rounds]
    return _OVERHEAD + chunks.longest * sum(each)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line; return the figures of each chunk length."""
    parser = harness.make_parser(__doc__)
    add_sample_options(parser)
    parser.set_defaults(samples=1)
    options = parser.parse_args(argv)
    chip = next(chip for chip in CHIPS if chip.name == "H100")
    samples = chosen_samples(options)
    columns = [f"batch {batch}: ms, samples/s" for batch in BATCHES]
    table = [["chunk", "blocks", "sequences", "MB", "size", *columns]]
    results: dict[str, dict[str, float]] = {}
    first = 0
    for kib in LENGTHS:
        cuts = [cut(sample, kib << 10) for sample in samples]
        size = sum(each.bytes for each in cuts) // len(cuts)
        first = first or size
        chunks = Chunks(max(each.blocks for each in cuts), max(each.longest for each in cuts), size)
        figures: dict[str, float] = asdict(chunks)
        words = [f"{kib} KiB", str(chunks.blocks), str(chunks.longest), f"{1e-6 * size:.2f}"]
        words.append(f"{100 * (size / first - 1):+.1f}%")
        for batch in BATCHES:
            low, high = (batch_seconds(chunks, batch, sequence, chip) for sequence in SEQUENCE)
            figures |= {f"batch {batch} seconds, least": low, f"batch {batch} seconds, most": high}
            words.append(f"{1e3 * low:.2f}-{1e3 * high:.2f}, {batch / high:,.0f}-{batch / low:,.0f}")
        table.append(words)
        results[f"{kib} KiB"] = figures
    print(f"{chip.name}, samples of {samples[0].counts.shape[0]}^3")
    print(format_table(table))
    if options.output:
        print("written to", harness.save("inflate_model", vars(options), results, options.output))
    return results


if __name__ == "__main__":
    main()
