"""slab_bench: every format that can be read in part is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import slab_bench


def test_the_parts_that_are_read_are_counted(tmp_path: Path) -> None:
    options = ["--formats", "npy,packed", "--size", "32", "--samples", "1", "--rounds", "1"]
    results = slab_bench.main([*options, "--output", str(tmp_path)])
    assert len(results) == 8
    # Planes and their neighbours; a packed sample of 32^3 is one chunk.
    assert results["npy, 2 ranks, periodic"].read == pytest.approx(18 / 32)
    assert results["npy, 4 ranks, zeros"].read == pytest.approx(9.5 / 32)
    assert results["npy, 4 ranks, zeros"].most_read == pytest.approx(10 / 32)
    assert results["packed, 4 ranks, zeros"].read == pytest.approx(1)
    assert results["npy, 2 ranks, zeros"].apart == 272
    (path,) = tmp_path.iterdir()
    assert set(json.loads(path.read_text())["results"]) == set(results)
