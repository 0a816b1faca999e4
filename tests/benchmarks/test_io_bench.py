"""io_bench: candidates deliver the same data, and each is charged for its own work only."""

from __future__ import annotations

import gzip
import itertools
import json
import mmap
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import candidates, emulation, harness, io_bench, samples
from pipelines.formats.registry import FORMATS
from pipelines.formats.tf_example import encode_example
from pipelines.formats.tfrecord import frame
from pipelines.loading.config import LoaderConfig

FLAGS = ["--samples", "3", "--steps", "2", "--size", "32", "--rounds", "1", "--batch-size", "2"]
FORMATS_MEASURED = ["npy", "packed", "tfrecord_gzip"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.slow
def test_candidates_are_measured_and_saved(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*FLAGS, "--data-dir", str(data), "--storage", "cache,direct", "--output", str(tmp_path)]
    flags += ["--formats", ",".join(FORMATS_MEASURED)]
    settings = io_bench.main(flags)
    assert list(settings) == [f"batch 2, 2 threads, {read}" for read in ("page cache", "O_DIRECT")]
    table = capsys.readouterr().out
    for results in settings.values():
        limits = {f"limit of {format_name}" for format_name in FORMATS_MEASURED}
        assert (
            results.keys()
            == {*FORMATS_MEASURED, io_bench.FLOOR, io_bench.NPY_PLAIN, io_bench.GZIP_PLAIN} | limits
        )
        for name, result in results.items():
            figures = result.figures
            assert figures.cpu_ms.p10 > 0 and name in table
            assert figures.samples_per_s.p10 <= figures.samples_per_s.median <= figures.samples_per_s.p90
            assert figures.bytes_per_s.median == pytest.approx(8 * 32**3 * figures.samples_per_s.median)
            assert 0 < figures.latency_ms[0] <= figures.latency_ms[1] <= figures.latency_ms[2]
        assert results[io_bench.FLOOR].cpu_of_floor == harness.Spread(1.0, 1.0, 1.0)
        assert results["npy"].plain == io_bench.NPY_PLAIN and results["packed"].plain == io_bench.GZIP_PLAIN
        for name in (io_bench.NPY_PLAIN, io_bench.GZIP_PLAIN):
            assert results[name].speed_of_plain == harness.Spread(1.0, 1.0, 1.0)
        assert results["limit of packed"].cpu_of_limit == harness.Spread(1.0, 1.0, 1.0)
        assert results["packed"].bytes_read < results["tfrecord_gzip"].bytes_read < 8 * 32**3
        assert results["npy"].bytes_read == 8 * 32**3 + 128 + 144
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["results"].keys() == settings.keys() | {"bars"}
    saved = record["results"]["batch 2, 2 threads, page cache"]["npy"]["figures"]["cpu_ms"]["median"]
    assert saved == next(iter(settings.values()))["npy"].figures.cpu_ms.median
    assert record["options"]["size"] == 32 and str(tmp_path) not in path.read_text()
    assert record["hardware"]["cores"] >= 1 and "torch" in record["versions"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_candidates_deliver_the_same_logarithms(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = samples.make_splits(data, list(FORMATS), samples=3, size=32)
    expected = [np.log1p(samples.simulated(index, 32).counts.astype(float)) for index in range(3)]
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(candidates, "touch", lambda volume: seen.append(volume.clone()))

    def check(batches: Iterator[int]) -> None:
        seen.clear()
        assert list(itertools.islice(batches, 3)) == [1, 1, 1]
        for index, volume in zip(candidates.planned(splits["npy"], 1, epoch=0), seen, strict=True):
            assert volume.shape == (1, 4, 32, 32, 32) and volume.dtype == torch.float32
            assert volume.is_contiguous(memory_format=torch.channels_last_3d)
            np.testing.assert_allclose(volume[0].permute(1, 2, 3, 0), expected[index], rtol=1e-6)

    published = splits["tfrecord_gzip"]
    # Without worker processes, which take seconds to start.
    check(candidates.plain_loader(candidates.PlainNpy(splits["npy"]), splits["npy"], 1, workers=0))
    check(candidates.plain_loader(candidates.PlainGzip(published), published, 1, workers=0))
    for direct in (False, True):
        check(candidates.dali_numpy(splits["npy"], 1, threads=2, direct=direct))
    for split in splits.values():
        for direct in (False, True):
            with candidates.project_loader(split, LoaderConfig(direct_io=direct)) as batches:
                check(batches)


def test_limit_reads_the_requested_bytes(tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(10_000)
    (tmp_path / "a").write_bytes(content)
    for direct in (False, True):
        for offset, length in ((0, 10_000), (512, 7_000), (4096, 4096), (9_000, 1_000)):
            into = mmap.mmap(-1, 4 * 4096)
            candidates._read(tmp_path / "a", offset, length, into, direct=direct)
            assert into[offset % 4096 :][:length] == content[offset : offset + length]


def test_samples_are_reproducible_and_compressed_as_published() -> None:
    sample = samples.simulated(1, 32)
    samples.simulated.cache_clear()
    np.testing.assert_array_equal(samples.simulated(1, 32).counts, sample.counts)
    assert not np.array_equal(samples.simulated(2, 32).counts, sample.counts)
    np.testing.assert_allclose(sample.counts.mean(axis=(0, 1, 2)), 1.0, rtol=1e-6)
    assert gzip.decompress(samples.compressed(sample)) == b"".join(frame(encode_example(sample)))


def test_interrupted_set_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(FORMATS["npy"], "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            samples.make_splits(tmp_path, ["npy"], samples=2, size=32)
    (split,) = samples.make_splits(tmp_path, ["npy"], samples=2, size=32).values()
    assert len(split) == 2 and [path.name for path in Path(split.root).parent.iterdir()] == ["npy"]


def test_utilisation_of_emulated_accelerators(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, "--data-dir", str(data), "--formats", "packed", "--rounds", "2"]
    ((_, results),) = io_bench.main([*flags, "--emulate", "0.02", "--accelerators", "2"]).items()
    found = results["packed"]
    # 40 ms for a batch of two tiny samples, which are ready in time.
    assert len(found.each) == 2 and all(0.5 < utilisation <= 1.0 for utilisation in found.each)
    assert found.samples_per_s <= 2 * 50
    # The formula takes a sleep as long as it was, and leaves out the first step.
    assert all(0.5 < utilisation <= 1.0 for utilisation in found.by_formula)
    assert min(found.by_formula) >= min(found.each) - 0.1
    assert "passes at 70%" in capsys.readouterr().out
    ((_, results),) = io_bench.main([*flags, "--emulate", "0.00001"]).items()
    assert len(results["packed"].each) == 1 and results["packed"].mean < 0.5


def test_killed_accelerator_is_named_and_all_end(data: Path) -> None:
    (split,) = samples.make_splits(data, ["npy"], samples=3, size=32).values()

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while len(multiprocessing.active_children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        (one,) = (child for child in multiprocessing.active_children() if child.name == "accelerator 1")
        one.kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RuntimeError, match="emulated accelerator 1 failed with exit status -9"):
        emulation.emulate(split, LoaderConfig(), 0.01, device="cpu", accelerators=2, steps=1)
    killer.join()
    assert not multiprocessing.active_children()


def test_invalid_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, option in (
        (["--formats", "npy,zip"], "--formats"),
        (["--samples", "2", "--batch-size", "1,4"], "--samples 2"),
        (["--rounds", "0"], "--rounds"),
        (["--storage", "tape"], "--storage"),
        (["--emulate", "-1"], "--emulate"),
    ):
        with pytest.raises(SystemExit):
            io_bench.main(flags)
        assert option in capsys.readouterr().err.splitlines()[-1]


def test_candidates_alternate_and_the_first_round_is_a_warm_up() -> None:
    order: list[str] = []

    def candidate(name: str, pause: float, samples: int) -> Iterator[int]:
        while True:
            order.append(name)
            time.sleep(pause)
            yield samples

    candidates = {"slow": candidate("slow", 0.04, 2), "fast": candidate("fast", 0.01, 1)}
    readings = harness.measure(candidates, rounds=3, lead=1, steps=2)
    assert order == (["slow"] * 3 + ["fast"] * 3) * 4
    assert len(readings["slow"]) == 3
    assert all(reading.wall >= 0.02 and reading.cpu < reading.wall for reading in readings["slow"])
    times = harness.ratio(readings["slow"], readings["fast"], "wall")
    assert times.p10 <= times.median <= times.p90


def _ahead(seconds: float) -> Iterator[int]:
    """Yield batches of `seconds` of CPU time each, started when the previous one is taken."""
    while True:
        thread = threading.Thread(target=_work, args=(seconds,))
        thread.start()
        yield 1
        thread.join()


def _work(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_work_ahead_is_charged_to_its_candidate() -> None:
    readings = harness.measure({"heavy": _ahead(0.2), "light": iter([1] * 100)}, rounds=2, lead=0, steps=1)
    assert all(reading.cpu == pytest.approx(0.2, abs=0.1) for reading in readings["heavy"])
    assert all(reading.cpu < 0.05 for reading in readings["light"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_running_and_ended_workers_are_counted() -> None:
    before = harness.cpu_seconds()
    # A fork starts at once; it runs no threads.
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(0.5,))
    worker.start()
    deadline = time.monotonic() + 30
    while harness.cpu_seconds() - before < 0.3 and worker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert worker.is_alive(), "the time of running workers was not counted"
    worker.join()
    assert harness.cpu_seconds() - before >= 0.5
