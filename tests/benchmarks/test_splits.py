"""Splits of data and space, and their part of the scaling benchmark's command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import model_validation, scaling
from benchmarks import scaling_model as model
from benchmarks.scaling_model import Job, Stages
from benchmarks.splits import SIZES, fastest, gains, network_of, splits
from pipelines.errors import ConfigError

MACHINE = replace(model_validation.NODES["H100"], staging=2e9, file_system=400e9)
STAGES = Stages(compute=0.004, forward=0.003, decode=0.005, read=model.PACKED)
FIGURES = ["--compute-ms", "4", "--decode-ms", "5"]
REFERENCE = network_of("reference", 128)


def test_groups_of_one_are_forecast_as_before() -> None:
    found = list(splits(MACHINE, STAGES, REFERENCE, nodes=16, epochs=model.EPOCHS, spatial=[1]))
    assert [each.job.batch for each in found] == [128, 512, 1024]
    sent = model_validation.gradients()
    for each in found:
        whole = model.forecast(MACHINE, STAGES, sent, Job(16, each.job.batch, model.EPOCHS[each.job.batch]))
        for name in ("step", "exposed", "rate", "steps", "staging", "train", "gpu_hours"):
            assert getattr(each.forecast, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_splits_divide_gpus_and_batch_evenly() -> None:
    found = splits(MACHINE, STAGES, REFERENCE, nodes=8, epochs={32: 1.0, 96: 1.0}, spatial=[1, 2, 3, 4, 8])
    # 64 GPUs are 32 groups of 2, 16 of 4, or 8 of 8.
    assert [(each.job.batch, each.job.spatial, each.samples) for each in found] == [
        (32, 2, 1), (32, 4, 2), (32, 8, 4), (96, 2, 3), (96, 4, 6), (96, 8, 12),
    ]  # fmt: skip


def test_step_and_epoch_are_those_of_fewer_larger_samples() -> None:
    network = network_of("reference", 512)
    (found,) = splits(MACHINE, STAGES, network, nodes=8, epochs={16: 1.0}, spatial=[4])
    assert found.forecast.steps == model.TRAIN / 64 / 16 and found.samples == 1
    parts = found.cost.compute * model.slowest(64) + found.forecast.exposed + found.cost.exchange
    assert found.forecast.step == pytest.approx(parts)
    assert found.rate == pytest.approx(16 / found.forecast.step)
    # Weights, gradients and momentum beside a quarter of the activations: more than those of the first block.
    kept = 128 * 512 * 512 * 32 * 2
    assert 12 * network.weights + kept < found.memory < 12 * network.weights + 4 * kept


def test_larger_samples_gain_more_from_more_gpus() -> None:
    spatial = [2, 4, 8]
    found = [gains(MACHINE, STAGES, network_of("reference", size), spatial) for size in SIZES]
    assert all(each[1] == 1 for each in found)
    for group in spatial:
        smaller, middle, larger = (each[group] for each in found)
        assert 1 < smaller < middle < larger < group


def test_fastest_split_of_each_number_of_nodes_trains_in_the_least_time() -> None:
    found = [
        each
        for nodes in (16, 64)
        for each in splits(MACHINE, STAGES, REFERENCE, nodes=nodes, epochs=model.EPOCHS, spatial=[1, 2, 4])
    ]
    for best in fastest(found):
        assert best.forecast.train == min(
            each.forecast.train for each in found if each.job.nodes == best.job.nodes
        )


def test_command_line_compares_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--nodes", "256", *FIGURES, "--spatial", "1", "2", "4", "--output", str(tmp_path)]
    scaling.main(flags)
    printed = capsys.readouterr().out
    assert "cut 4x4" in printed
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["results"]["splits"]
    # 2,048 GPUs train faster than 1,024, the most that whole samples allow.
    alone = scaling.main(["--nodes", "256", *FIGURES])[1][0].one
    best = min(rows, key=lambda row: row["forecast"]["train"])
    assert (alone.gpus, best["job"]["batch"], best["job"]["spatial"]) == (1024, 512, 4)
    assert best["forecast"]["train"] < alone.train
    assert "cut 4x4" not in capsys.readouterr().out


def test_picture_has_the_sizes(tmp_path: Path) -> None:
    picture = tmp_path / "gain.png"
    flags = ["--size", "256", "--model", "open", "--batch", "8", "--plot", str(picture)]
    scaling.main(["--nodes", "1", *FIGURES, "--spatial", "1", "2", *flags])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_groups_that_divide_nothing_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        scaling.main(["--nodes", "1", *FIGURES, "--spatial", "3"])
    assert error.value.key == "--spatial"
