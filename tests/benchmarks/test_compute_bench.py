"""compute_bench: rows, operation counts and results."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from benchmarks import compute_bench, compute_table, limits, recipes
from benchmarks.harness import Spread
from benchmarks.limits import step_flops
from benchmarks.recipes import PlainOpen, PlainReference
from benchmarks.samples import folder_name
from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.errors import ConfigError, DataError

FLAGS = ["--size", "16", "--batch-size", "2", "--steps", "2", "--rounds", "2", "--device", "cpu"]


@pytest.mark.parametrize(
    ("network", "precision"), [("reference", "bf16"), pytest.param("open", "fp32", marks=pytest.mark.slow)]
)
def test_rows_are_measured_and_saved(
    network: str,
    precision: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(limits.MATRIX_SIZE, "cpu", 512)
    monkeypatch.setattr(limits, "COPIED", 1 << 24)
    trace = tmp_path / "trace.json"
    flags = [*FLAGS, "--network", network, "--precision", precision, "--profile", str(trace)]
    rows = compute_bench.main([*flags, "--output", str(tmp_path)])
    names = ["plain PyTorch, batch 2", f"{precision} eager auto, batch 2"]
    assert list(rows) == names
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert row.samples_per_s.median > 0 and row.cpu_ms.median > 0 and row.forward_ms.median > 0
        assert row.share_of_matrix > 0 and row.peak > 0 and name in printed
        assert len(row.layers) == (4 if network == "reference" else 0)
    assert rows[names[0]].speed_of_plain.median == 1.0
    (path,) = tmp_path.glob("*compute_bench.json")
    saved = json.loads(path.read_text())["results"]
    assert saved.keys() == {"limits", "bars", *names} and path.with_suffix(".png").stat().st_size > 1000
    assert json.loads(trace.read_text())["traceEvents"]


class FakeProcess:
    """Takes steps of a second; stopped when its blocks are to be measured."""

    def __init__(self, *_: object) -> None: ...

    def wait(self) -> None: ...

    def take_steps(self, steps: int) -> tuple[float, float, float]:
        return 1.0, 1.0, 1.0

    def peak(self) -> int:
        return 1

    def layers(self) -> list[object]:
        raise KeyboardInterrupt

    def close(self) -> None: ...


def test_rows_are_saved_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.MATRIX_SIZE, "cpu", 512)
    monkeypatch.setattr(limits, "COPIED", 1 << 24)
    monkeypatch.setattr(compute_bench, "RecipeProcess", FakeProcess)
    with pytest.raises(KeyboardInterrupt):
        compute_bench.main([*FLAGS, "--output", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    saved = json.loads(path.read_text())["results"]
    assert saved.keys() == {"limits", "bars", "plain PyTorch, batch 2", "fp32 eager auto, batch 2"}
    assert saved["fp32 eager auto, batch 2"]["samples_per_s"]["median"] == 2.0


def test_limits_are_measured_after_the_clock_has_risen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    calls: list[float] = []

    def timed(act: object, times: int, device: torch.device) -> tuple[float, float]:
        # Ever slower, as an idle GPU is not: the first calls must not count.
        calls.append(float(len(calls) + 1))
        return calls[-1], 0.0

    monkeypatch.setattr(limits, "timed", timed)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(limits, "COPIED", 1 << 10)
    monkeypatch.setitem(limits.WARM_UP, "cpu", 4.0)
    assert limits.copy_rate(torch.device("cpu")) == 2 * 1024 / 4.0
    assert len(calls) == 3 + 6 and limits.WARM_UP["cuda"] > 0


@pytest.mark.slow
def test_whole_loop_reads_samples_during_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(limits.MATRIX_SIZE, "cpu", 512)
    monkeypatch.setattr(limits, "COPIED", 1 << 24)
    flags = [*FLAGS, "--size", "32", "--loop", "--samples", "3", "--data-dir", str(tmp_path)]
    rows = compute_bench.main(flags)
    name = "fp32 eager auto, batch 2, from packed"
    assert list(rows) == ["plain PyTorch, batch 2", "fp32 eager auto, batch 2", name]
    assert [row.speed_of_resident is not None for row in rows.values()] == [False, False, True]
    assert "of the samples/s on resident data" in capsys.readouterr().out
    (shard,) = (tmp_path / "3x32" / folder_name("packed")).glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:-2000])
    # The loader's error is raised, and no process remains.
    with pytest.raises(DataError) as error:
        compute_bench.main(flags)
    assert error.value.path == str(shard)


def test_incompatible_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, option in (
        (["--loop", "--samples", "1", "--batch-size", "2"], "--samples 1"),
        (["--layout", "contiguous", "--engine", "eager,graph"], "--layout contiguous"),
    ):
        with pytest.raises(SystemExit):
            compute_bench.main(flags)
        assert option in capsys.readouterr().err


def test_recipe_that_cannot_start_reports_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process, which must keep its settings.
    monkeypatch.setattr(recipes, "configure_torch", lambda *_: None)
    options = compute_bench._options([*FLAGS, "--kernels", "triton"])
    *_, recipe = compute_bench.recipes(options, torch.device("cpu"))
    here, remote = multiprocessing.Pipe()
    recipes._serve(remote, recipe, "reference", 16, "cpu")
    error = here.recv()
    assert isinstance(error, ConfigError) and error.key == "compute.kernels"


def test_options_span_named_recipes() -> None:
    flags = ["--kernels", "auto,triton", "--layout", "channels_last,contiguous"]
    options = compute_bench._options(["--batch-size", "2", "--precision", "bf16", *flags])
    _, *own = compute_bench.recipes(options, torch.device("cpu"))
    assert {recipe.name: (recipe.compute.kernels, recipe.layout) for recipe in own} == {
        "bf16 eager auto, batch 2": ("auto", "channels_last"),
        "bf16 eager auto contiguous, batch 2": ("auto", "contiguous"),
        "bf16 eager auto triton, batch 2": ("triton", "channels_last"),
        "bf16 eager auto triton contiguous, batch 2": ("triton", "contiguous"),
    }


def test_batches_are_compared_with_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    def row(samples_per_s: float) -> compute_table.Result:
        rate, none = Spread.of([samples_per_s]), Spread.of([1.0])
        return compute_table.Result("fp16", rate, none, none, 1.0, 1.0, none, None, None, 1, [])

    rows = {"bf16 graph auto, batch 8": row(700.0)}
    compute_table.show_over_record(rows)
    assert capsys.readouterr().out == ""
    compute_table.show_over_record({"the record's recipe, batch 1": row(200.0), **rows})
    expected = "bf16 graph auto, batch 8: 3.50 times the samples/s of the record's recipe, batch 1\n"
    assert capsys.readouterr().out == expected


def test_plain_networks_equal_the_projects() -> None:
    volume = torch.rand(2, 4, 16, 16, 16)
    shape = ReferenceConfig(size=16, blocks=3, filters=4, dense=(16, 8), dropout=0.0)
    torch.testing.assert_close(PlainReference(shape, 3)(volume), CosmoFlow(shape, 3)(volume))
    for mode in (True, False):
        fused, plain = (kind(OpenConfig(size=16), 3).train(mode) for kind in (OpenCosmoFlow, PlainOpen))
        torch.testing.assert_close(plain(volume), fused(volume))


def test_operations_of_convolutions_and_dense_layers() -> None:
    # 27 products and as many sums per output of a convolution; forward, and twice as many backward, except
    # in the first block, whose input needs no gradient.
    widths, size, expected = (4, 32, 64, 128, 256, 512), 128, 0.0
    for block, (a, b) in enumerate(itertools.pairwise(widths)):
        expected += 2 * 27 * a * b * (size >> block) ** 3 * (3 if block else 2)
    expected += 3 * 2 * (512 * 64 * 128 + 128 * 64 + 64 * 4)
    assert step_flops("reference", 128) == pytest.approx(expected)
    assert expected == pytest.approx(190e9, rel=0.02)
