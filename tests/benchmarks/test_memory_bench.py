"""memory_bench: every program runs, and its memory is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import memory_bench


@pytest.mark.slow
def test_every_program_is_measured(tmp_path: Path) -> None:
    peaks = memory_bench.main(["--size", "32", "--workers", "1", "--output", str(tmp_path)])
    assert {"simulate", "tfrecord_gzip to packed", "verify packed", "HDF5 to packed"} < set(peaks)
    # A worker beside the program that starts it.
    assert all(peak.tree > peak.process > 10e6 for peak in peaks.values())
    (path,) = tmp_path.iterdir()
    assert set(json.loads(path.read_text())["results"]["measured"]) == set(peaks)
