"""The model of a GPU that inflates packed samples: sequences of LZ4 blocks, and the time of a batch."""

from __future__ import annotations

import json
from pathlib import Path

import lz4.block
import pytest

from benchmarks import inflate_model
from benchmarks.inflate_model import Chunks, batch_seconds, count_sequences
from benchmarks.step_model import CHIPS

H100 = next(chip for chip in CHIPS if chip.name == "H100")


def test_sequences_are_those_of_the_block_format() -> None:
    # By LZ4's description: token, length of the literals, literals, offset, length of the match.
    literals = b"\xf0\x00" + b"abcdefghijklmno" + b"\x01\x00"
    match = b"\x1f" + b"p" + b"\x02\x00" + b"\xff\x07"
    last = b"\x50" + b"vwxyz"
    block = literals + match + last
    assert count_sequences(block) == 3
    # The block is valid: 15 literals and a match of 4, 1 and a match of 15 + 255 + 7 + 4, 5 literals.
    size = 15 + 4 + 1 + 281 + 5
    assert len(lz4.block.decompress(block, uncompressed_size=size)) == size
    assert count_sequences(lz4.block.compress(bytes(range(256)), store_size=False)) == 1
    assert count_sequences(lz4.block.compress(bytes(65536), store_size=False)) == 2


def test_the_longest_block_sets_the_time_until_warps_share_a_scheduler() -> None:
    alone = batch_seconds(Chunks(64, 4000, 0), 1, 0.5e-6, H100)
    assert alone == pytest.approx(50e-6 + 4000 * 0.5e-6)
    # 132 multiprocessors with four schedulers: eight samples of 64 blocks are 512 warps.
    assert batch_seconds(Chunks(64, 4000, 0), 8, 0.5e-6, H100) == alone
    # Eight warps a scheduler issue 150 instructions each.
    shared = batch_seconds(Chunks(528, 1000, 0), 8, 0.5e-6, H100)
    assert shared == pytest.approx(50e-6 + 1000 * 8 * 150 / 1.755e9)
    # Of 17 warps, one waits for the others to end.
    rounds = batch_seconds(Chunks(528, 1000, 0), 17, 0.5e-6, H100)
    assert rounds == pytest.approx(50e-6 + 1000 * (16 * 150 / 1.755e9 + 0.5e-6))


def test_chunk_lengths_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = inflate_model.main(["--size", "32", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["64", "32", "16", "8", "4"]
    # A plane has 32 KiB.
    counts = [figures["blocks"] for figures in results.values()]
    assert counts == [counts[0] * factor for factor in (1, 1, 2, 4, 8)]
    assert results["4 KiB"]["longest"] < results["16 KiB"]["longest"] < results["32 KiB"]["longest"]
    assert results["4 KiB"]["bytes"] > results["32 KiB"]["bytes"]
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"] == results
