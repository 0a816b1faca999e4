"""convert_bench: the project's converter takes turns with the plain one, to any format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import convert_bench


@pytest.mark.slow
@pytest.mark.parametrize("to", ["npy", "packed"])
def test_the_converters_take_turns(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--to", to, "--files", "16", "--size", "32", "--rounds", "1", "--output", str(tmp_path)]
    results = convert_bench.main(flags)
    limit = {"npy": "40.0", "packed": "90.0"}[to]
    assert f"at most {limit}\n" in capsys.readouterr().out
    assert results.start_cpu_ms[convert_bench.PROJECT].median > 0 and set(results.peak_memory) == {2, 16}
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["options"]["to"] == to
