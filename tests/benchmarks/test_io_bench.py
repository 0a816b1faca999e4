"""The input benchmark: all contestants deliver the same, and are charged for all of their own work only."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import harness, io_bench
from pipelines.formats import FORMATS

FLAGS = ["--samples", "4", "--size", "16", "--rounds", "2", "--batch-size", "2"]


def test_every_contestant_is_measured_and_the_result_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    results = io_bench.main([*FLAGS, "--data-dir", str(data), "--output", str(out)])
    assert results.keys() == {*FORMATS, io_bench.FLOOR, io_bench.PLAIN}
    for result in results.values():
        figures = result.figures
        assert figures.cpu_ms.p10 > 0
        assert figures.samples_per_s.p10 <= figures.samples_per_s.median <= figures.samples_per_s.p90
        assert figures.bytes_per_s.median == pytest.approx(8 * 16**3 * figures.samples_per_s.median)
    assert results[io_bench.FLOOR].cpu_of_floor == harness.Spread(1.0, 1.0, 1.0)
    assert results[io_bench.PLAIN].speed_of_plain == harness.Spread(1.0, 1.0, 1.0)
    table = capsys.readouterr().out
    assert all(name in table for name in results)
    (path,) = out.iterdir()
    record = json.loads(path.read_text())
    assert record["results"].keys() == results.keys() | {"bars"}
    assert record["results"]["npy"]["figures"]["cpu_ms"]["median"] == results["npy"].figures.cpu_ms.median
    assert record["options"]["size"] == 16 and str(tmp_path) not in path.read_text()
    assert record["hardware"]["cores"] >= 1 and "torch" in record["versions"]


def test_all_contestants_deliver_the_same_logarithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = io_bench.make_splits(tmp_path, list(FORMATS), samples=3, size=16)
    expected = [np.log1p(io_bench.synthetic_sample(index, 16).counts.astype(float)) for index in range(3)]
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(io_bench, "touch", lambda volume: seen.append(volume.clone()))

    def check(batches: Iterator[int]) -> None:
        seen.clear()
        assert list(itertools.islice(batches, 3)) == [1, 1, 1]
        for index, volume in zip(io_bench.planned(splits["npy"], 1, epoch=0), seen, strict=True):
            assert volume.shape == (1, 4, 16, 16, 16) and volume.dtype == torch.float32
            assert volume.is_contiguous(memory_format=torch.channels_last_3d)
            np.testing.assert_allclose(volume[0].permute(1, 2, 3, 0), expected[index], rtol=1e-6)

    check(io_bench.plain_loader(splits["npy"], 1))
    check(io_bench.dali_numpy(splits["npy"], 1, threads=2))
    for split in splits.values():
        with io_bench.ours(split, 1, threads=2) as batches:
            check(batches)


def test_counts_are_the_same_every_time_and_look_like_the_published_ones() -> None:
    counts = io_bench.synthetic_sample(7, 32).counts
    np.testing.assert_array_equal(counts, io_bench.synthetic_sample(7, 32).counts)
    assert counts.shape == (32, 32, 32, 4) and counts.dtype == np.int16
    np.testing.assert_allclose(counts.mean(axis=(0, 1, 2)), 1.0, atol=0.05)
    empty = (counts == 0).mean(axis=(0, 1, 2))
    assert empty[0] == pytest.approx(0.55, abs=0.02) and (np.diff(empty) < 0).all()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--formats", "npy,zip"], "'zip' is none of"),
        (["--samples", "2", "--batch-size", "4"], "do not fill one batch"),
        (["--rounds", "0"], "0 is below 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        io_bench.main(flags)
    assert reason in capsys.readouterr().err


def test_turns_alternate_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def contestant(name: str, pause: float, samples: int) -> Iterator[int]:
        while True:
            order.append(name)
            time.sleep(pause)
            yield samples

    contestants = {"slow": contestant("slow", 0.04, 2), "fast": contestant("fast", 0.01, 1)}
    readings = harness.measure(contestants, rounds=3, lead=1, steps=2)
    assert order == (["slow"] * 3 + ["fast"] * 3) * 4
    assert len(readings["slow"]) == 3
    assert all(reading.wall >= 0.02 and reading.cpu < reading.wall for reading in readings["slow"])
    times = harness.ratio(readings["slow"], readings["fast"], "wall")
    assert times.p10 <= times.median <= times.p90


def _ahead(seconds: float) -> Iterator[int]:
    """Batches that cost `seconds` of processor time each, begun when the one before is taken."""
    while True:
        thread = threading.Thread(target=_work, args=(seconds,))
        thread.start()
        yield 1
        thread.join()


def _work(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_what_one_works_ahead_is_not_charged_to_the_next() -> None:
    readings = harness.measure({"heavy": _ahead(0.2), "light": iter([1] * 100)}, rounds=2, lead=0, steps=1)
    assert all(reading.cpu == pytest.approx(0.2, abs=0.1) for reading in readings["heavy"])
    assert all(reading.cpu < 0.05 for reading in readings["light"])


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
