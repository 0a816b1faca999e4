"""The input benchmark: it runs, every contestant delivers, and CPU time counts workers too."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from benchmarks import harness, io_bench
from pipelines.formats import FORMATS


def test_every_contestant_is_measured_and_the_result_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--samples", "4", "--size", "32", "--rounds", "2", "--batch-size", "2"]
    results = io_bench.main([*flags, "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")])
    names = {*FORMATS, io_bench.FLOOR, io_bench.PLAIN}
    assert {name for name, value in results.items() if isinstance(value, harness.Summary)} == names
    assert all(results[name].samples_per_s > 0 and results[name].cpu_ms > 0 for name in names)
    table = capsys.readouterr().out
    assert all(name in table for name in results)
    (path,) = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text())
    assert record["results"].keys() == results.keys()
    assert record["hardware"]["cores"] >= 1 and "torch" in record["versions"]


def test_turns_alternate_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def contestant(name: str, pause: float, samples: int) -> int:
        order.append(name)
        time.sleep(pause)
        return samples

    readings = harness.take_turns(
        {"slow": lambda: contestant("slow", 0.04, 2), "fast": lambda: contestant("fast", 0.01, 1)}, rounds=3
    )
    assert order == ["slow", "fast"] * 4
    assert all(reading.wall >= 0.02 and reading.cpu < reading.wall for reading in readings["slow"])
    middle, low, high = harness.ratios(readings["slow"], readings["fast"], "wall")
    assert low <= middle <= high


def _work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_workers_count_while_they_live_and_when_they_have_ended() -> None:
    before = harness.cpu_seconds()
    worker = multiprocessing.get_context("spawn").Process(target=_work, args=(0.5,))
    worker.start()
    deadline = time.monotonic() + 30
    while harness.cpu_seconds() - before < 0.3 and worker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert worker.is_alive(), "its time was seen only after it ended"
    worker.join()
    assert harness.cpu_seconds() - before >= 0.5
