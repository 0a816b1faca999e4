"""Runs whose ranks share samples (`parallel.spatial`): equal to those of one rank with whole samples."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import DATA, OPEN, SIZE, Ranks, command, config_file, program, tiny_sample, write_tiny
from helpers import run as run_command
from run_artifacts import metrics, same_weights, weights

from cosmoflow_dali.config import read_yaml, resolve
from cosmoflow_dali.mlperf.checkers import check_compliance
from cosmoflow_dali.training.checkpoint import Checkpoint
from cosmoflow_dali.training.run_data import check_data, open_data, simulate_missing
from cosmoflow_dali.training.run_dir import Run
from pipelines.distributed.world import World
from pipelines.errors import ConfigError
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.registry import FORMATS

TRAIN = "cosmoflow_dali.train"
EXACT = 1e-5
"""Relative error of losses and weights that rounding in float32 explains."""

# Rates at which rounding errors do not grow from step to step. Adam would turn those of a gradient near zero
# into a full step.
REFERENCE: dict[str, Any] = {
    # Ranks that share a sample must drop the same activations.
    "model": {"size": SIZE, "blocks": 3, "filters": 2, "dense": [16, 8], "dropout": 0.2},
    "schedule": {"initial_lr": 0.001, "base_lr": 0.002, "warmup_epochs": 1, "decay_epochs": [2],
                 "decay_factors": [0.25]},
    "symmetries": True,
    "log": {"every": 1, "checkpoint_every": 2},
    "epochs": 2,
}  # fmt: skip
MULTISCALE: dict[str, Any] = OPEN | {
    "model": {"kind": "open", "size": SIZE, "widths": [4, 8, 8], "multiscale": True},
    "optimizer": {"kind": "sgd"},
    "schedule": {"kind": "one_cycle", "peak_lr": 0.001},
    "log": {"every": 1},
    "epochs": 4,
}


def train(config: Path, run: Path, *more: object, ranks: int = 1, spatial: int = 1) -> Path:
    """Train to the end, with `spatial` ranks a sample; return `run`."""
    done = program(TRAIN, "--config", config, "--run-dir", run, "--spatial", spatial, *more, ranks=ranks)
    assert done.code == 0, done.err
    return run


def check_equal(run: Path, expected: Path, steps: int, epochs: int) -> None:
    """Compare losses, scores and weights of two runs but for rounding."""
    for key, count in (("loss", steps), ("mae", epochs)):
        found, exact = ([line[key] for line in metrics(each) if key in line] for each in (run, expected))
        assert len(found) == count
        assert found == pytest.approx(exact, rel=EXACT)
    found_weights, exact_weights = weights(run), weights(expected)
    assert found_weights.keys() == exact_weights.keys()
    for name, exact_values in exact_weights.items():
        error = (found_weights[name] - exact_values).double().norm()
        assert error <= EXACT * exact_values.double().norm(), name


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def predictions(run: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.loadtxt(run / "predictions.csv", delimiter=",", skiprows=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training and 5 validation samples of 16^3, as npy pairs."""
    return write_tiny(tmp_path_factory.mktemp("data"), train=12, validation=5)


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_file(tmp_path_factory.mktemp("config") / "c.yaml", data, **REFERENCE)


@pytest.fixture(scope="module")
def one(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank."""
    return train(config, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def shared(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, of two ranks that share every sample."""
    return train(config, tmp_path_factory.mktemp("shared") / "run", ranks=2, spatial=2)


def test_two_ranks_a_sample_train_the_network_of_one(one: Path, shared: Path) -> None:
    check_equal(shared, one, steps=6, epochs=2)
    found, exact = predictions(shared), predictions(one)
    # Each sample once.
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_logs_and_report_tell_of_shared_samples(one: Path, shared: Path) -> None:
    found, exact = summary_of(shared), summary_of(one)
    assert (found["ranks"], found["ranks_per_sample"], found["samples"]) == (2, 2, 5)
    assert exact["ranks_per_sample"] == 1
    for key in ("global_batch", "steps", "epochs", "parameters"):
        assert found[key] == exact[key]
    assert "on 2 ranks, each sample cut over 2 of them" in (shared / "report.html").read_text()
    assert "each sample cut" not in (one / "report.html").read_text()
    events = [json.loads(line[9:]) for line in (shared / "mlperf.log").read_text().splitlines()]
    assert [event["value"] for event in events if event["key"] == "global_batch_size"] == [4]
    # They lack the quality that the benchmark demands, and nothing else.
    assert check_compliance(shared / "mlperf.log", "3.0") == check_compliance(one / "mlperf.log", "3.0")


def test_evaluate_and_predict_read_whole_samples(shared: Path, data: Path) -> None:
    newest = max((shared / "checkpoints").iterdir())
    done = program("cosmoflow_dali.evaluate", "--data-dir", data, "--weights", newest)
    assert done.code == 0, done.err
    scores, summary = json.loads(done.out), summary_of(shared)
    assert scores["samples"] == 5
    assert scores["mae_per_parameter"] == pytest.approx(summary["mae_per_parameter"], rel=EXACT)
    files = sorted((data / "validation").glob("*_data.npy"))
    done = program("cosmoflow_dali.predict", "--weights", newest, *files)
    assert done.code == 0, done.err
    rows = [line.split(",")[1::2] for line in done.out.splitlines()[1:]]
    np.testing.assert_allclose(np.array(rows, float), predictions(shared)[:, 5:], rtol=1e-5)


def test_run_resumes_with_another_number_of_ranks_a_sample(
    config: Path, shared: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(shared, tmp_path / "run")
    for path in sorted((run / "checkpoints").iterdir())[1:]:
        path.unlink()
    position = Checkpoint.load(max((run / "checkpoints").iterdir())).position
    assert position.epoch < 2
    # Two ranks, each of which takes whole samples now.
    done = program(TRAIN, "--run-dir", run, "--resume", "--spatial", 1, ranks=2)
    fault = "error: loader.batch_size = 4: on 2 ranks, 1 to a sample, makes a global batch of 8"
    assert done.code == 1 and done.err.count("\n") == 1 and done.err.startswith(fault), done.err
    check_equal(train(config, run, "--resume"), shared, steps=6, epochs=2)


@pytest.mark.parametrize(
    ("spatial", "changes", "key"),
    [
        (0, {}, "parallel.spatial"),
        (-2, {}, "parallel.spatial"),
        (2, {}, "parallel.spatial"),  # On one rank.
        (3, {}, "parallel.spatial"),
        (16, {}, "parallel.spatial"),  # Slabs of one plane.
        (2, {"loader": {"apply_log": False}}, "loader.apply_log"),
        (2, {"loader": {"gpu_direct": True}}, "loader.gpu_direct"),
        (2, {"compute": {"engine": "compile"}}, "compute.engine"),
        (2, {"compute": {"kernels": "triton"}}, "compute.kernels"),
    ],
)
def test_settings_that_do_not_go_with_shared_samples_are_refused(
    spatial: int, changes: dict[str, Any], key: str, data: Path, tmp_path: Path
) -> None:
    config, run = config_file(tmp_path / "c.yaml", data, **changes), tmp_path / "run"
    done = program(TRAIN, "--config", config, "--run-dir", run, "--spatial", spatial)
    value = spatial if key == "parallel.spatial" else None
    assert done.code == 1 and done.err.count("\n") == 1, done.err
    assert done.err.startswith(f"error: {key} = {'' if value is None else f'{value}: '}")
    assert not run.exists()


def test_nothing_is_simulated_for_a_run_that_is_refused(tmp_path: Path) -> None:
    simulate = {"size": 32, "train": 2, "validation": 1}
    data = {"dir": str(tmp_path / "data"), "simulate": simulate}
    config = config_file(tmp_path / "c.yaml", tmp_path, model={"size": 32, "blocks": 2}, data=data)
    # One rank is no group of two.
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run", "--spatial", 2)
    assert done.code == 1 and done.err.startswith("error: parallel.spatial = 2: "), done.err
    # Of the published format no part can be read.
    with pytest.raises(ConfigError) as refusal:
        simulate_missing(resolve(read_yaml(config), {"parallel.spatial": 2}))
    assert refusal.value.key == "data.simulate.format"
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


def test_packed_samples_of_an_old_version_are_refused(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        shutil.copytree(DATA / "before_0_2" / "packed", tmp_path / split)
    config = config_file(tmp_path / "c.yaml", tmp_path, model={"size": 8, "blocks": 2})
    for changes in ({}, {"loader.on_bad_sample": "skip"}):
        with pytest.raises(ConfigError, match=r"-m preprocess.convert -i SRC -o DST --to packed") as refusal:
            open_data(resolve(read_yaml(config), {"parallel.spatial": 2} | changes), World(size=2))
        assert refusal.value.key == "parallel.spatial"


@pytest.mark.parametrize(("local_size", "multiplier", "fits"), [(1, 1, False), (1, 2, True), (2, 1, True)])
def test_nodes_with_the_same_staged_samples_hold_whole_groups(
    local_size: int, multiplier: int, fits: bool, data: Path, tmp_path: Path
) -> None:
    stage = {"dir": str(tmp_path), "shard_type": "local", "shard_multiplier": multiplier}
    changes = {"data": {"dir": str(data), "stage": stage}, "loader": {"batch_size": 1}}
    config = config_file(tmp_path / "c.yaml", data, parallel={"spatial": 2}, **changes)
    settings, world = resolve(read_yaml(config)), World(size=4, local_size=local_size)
    train, validation, *_ = open_data(settings, world)
    run = Run(tmp_path, settings, None, train, validation, {}, {})
    if fits:
        check_data(run, world)
        return
    with pytest.raises(ConfigError) as refusal:
        check_data(run, world)
    assert refusal.value.key == "parallel.spatial"


@pytest.mark.slow
def test_resume_after_kill_9_of_a_rank_is_exact(config: Path, shared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Ranks(command(TRAIN, ["--config", config, "--run-dir", run, "--spatial", 2]), range(2), 2) as ranks:
        deadline = time.monotonic() + 120
        while not any((run / "checkpoints").glob("*.pt")) and time.monotonic() < deadline:
            time.sleep(0.002)
        ranks.processes[1].kill()
        statuses, words = ranks.end(90, 1)
    assert statuses == {1} and "rank 1 " in words and "connection lost" in words, words
    checkpoint = Checkpoint.newest(run / "checkpoints")
    assert checkpoint is not None and checkpoint.position.epoch < 2
    done = program(TRAIN, "--run-dir", run, "--resume", ranks=2)
    assert done.code == 0, done.err
    assert metrics(run) == metrics(shared) and same_weights(run, shared)


@pytest.mark.slow
def test_groups_of_ranks_train_the_open_network_of_one_on_converted_samples(tmp_path: Path) -> None:
    published = write_tiny(tmp_path / "published", train=20, validation=3, format_name="tfrecord_gzip")
    config = config_file(tmp_path / "c.yaml", published, **MULTISCALE)
    one, packed = train(config, tmp_path / "one"), tmp_path / "packed"
    refused = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run", "--spatial", 2, ranks=2)
    assert refused.code == 1 and not (tmp_path / "run").exists()
    (command_line,) = re.findall(r"run python -m (.*)", refused.err)
    module, *arguments = command_line.replace("SRC", str(published)).replace("DST", str(packed)).split()
    assert program(module, *arguments).code == 0
    for spatial, batch in ((2, 2), (4, 4)):
        more = "--data-dir", packed, "--batch-size", batch
        run = train(config, tmp_path / f"run {spatial}", *more, ranks=4, spatial=spatial)
        check_equal(run, one, steps=20, epochs=4)


def write_sample(root: Path, index: int, format_name: str, damaged_plane: int | None = None) -> None:
    """Write a sample of which each plane is read and checked alone."""
    sample = tiny_sample(index)
    if format_name == "npy":
        if damaged_plane is not None:
            sample.counts[damaged_plane, 2, 3, 0] = -5
        FORMATS["npy"].write(root, f"{index:04d}", sample)
        return
    start, *chunks = encode(sample, chunk_voxels=SIZE**2)
    if damaged_plane is not None:
        chunks[damaged_plane] = bytes([chunks[damaged_plane][0] ^ 1]) + chunks[damaged_plane][1:]
    write_shard(root / f"{index:04d}.tar", [(f"{index:04d}.packed", [start, *chunks])])


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["npy", "packed"])
def test_sample_damaged_in_the_part_of_one_rank_is_skipped_by_its_group(
    format_name: str, tmp_path: Path
) -> None:
    data, damaged = tmp_path / "data", {3: 3, 4: 12, 102: 12}
    for split, indices in (("train", range(12)), ("validation", range(100, 105))):
        (data / split).mkdir(parents=True)
        for index in indices:
            write_sample(data / split, index, format_name, damaged.get(index))
    changes = REFERENCE | {"loader": {"batch_size": 2, "on_bad_sample": "skip"}}
    config = config_file(tmp_path / "c.yaml", data, **changes)
    one = train(config, tmp_path / "one")
    shared = train(config, tmp_path / "shared", ranks=2, spatial=2)
    check_equal(shared, one, steps=12, epochs=2)
    for run in (one, shared):
        summary = summary_of(run)
        assert summary["skipped_samples"] == {"train": 2, "validation": 1} and summary["samples"] == 4
        assert predictions(run)[:, 0].tolist() == [0, 1, 3, 4]
    flags = ["--set", "loader.on_bad_sample=fail"]
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "fail", "--spatial", 2, *flags, ranks=2)
    assert done.code == 1 and "Traceback" not in done.err
    faults = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert 1 <= len(faults) <= 2
    for fault in faults:
        (rank,) = re.findall(r"rank (\d) of 2: ", fault)
        assert {"0": "/0003", "1": "/0004"}[rank] in fault


@pytest.mark.slow
def test_posteriors_are_fitted_and_scored_on_whole_samples(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=104, validation=3, test=12)
    changes = MULTISCALE | {"posterior": {"calibration": 0.5}, "epochs": 1}
    config = config_file(tmp_path / "c.yaml", data, **changes)
    run = train(config, tmp_path / "run", ranks=2, spatial=2)
    posterior = summary_of(run)["posterior"]
    assert posterior["fit_samples"] == {"summaries": 104, "network": 52} and posterior["samples"] == 12
    newest = max((run / "checkpoints").glob("epoch*.pt"))
    done = program("cosmoflow_dali.evaluate", "--data-dir", data, "--weights", newest, "--split", "test")
    assert done.code == 0, done.err
    scores = json.loads(done.out)["posterior"]["scores"]
    assert scores.keys() == posterior["scores"].keys()
    for name, score in scores.items():
        assert score["nll"] == pytest.approx(posterior["scores"][name]["nll"], rel=1e-4), name


@pytest.mark.slow
def test_instances_side_by_side_share_their_samples_each(config: Path, shared: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    line = ["--config", config, "--run-dir", both, "--instances", 2, "--spatial", 2]
    done = run_command(command(TRAIN, line, ranks=4))
    assert done.code == 0, done.err
    # The first has the seed of the configuration.
    assert metrics(both / "1") == metrics(shared) and same_weights(both / "1", shared)
    found = summary_of(both / "2")
    assert (found["seed"], found["ranks"], found["ranks_per_sample"], found["global_batch"]) == (6, 2, 2, 4)
