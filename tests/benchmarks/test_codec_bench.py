"""codec_bench: all candidates are lossless, and the packed format is one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import write_tiny

from benchmarks import codec_bench, samples
from pipelines.formats.packed.encode import PRESETS, encode


def test_all_candidates_are_measured_and_one_is_the_packed_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--samples", "2", "--size", "32", "--rounds", "1", "--output", str(tmp_path)]
    results = codec_bench.main(flags)
    table = capsys.readouterr().out
    assert all(name in table for name in codec_bench.CANDIDATES)
    assert results["counts, none"].ratio == pytest.approx(1.0)
    for result in results.values():
        assert result.total_ms >= result.inflate_ms and result.pack_ms > 0
    for preset in PRESETS:
        packed = sum(len(b"".join(encode(samples.simulated(index, 32), preset))) for index in range(2))
        assert results[f"packed, {preset}"].ratio == pytest.approx(2 * 8 * 32**3 / packed)
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["results"].keys() == results.keys()


def test_samples_of_a_folder(tmp_path: Path) -> None:
    data = write_tiny(tmp_path, train=1, validation=1, format_name="tfrecord_gzip", size=16)
    assert codec_bench.main(["--data", str(data / "train"), "--rounds", "1"])["bytes, lz4"].ratio > 1
