"""Training from packed samples: the run of the published files, and exact wherever it is stopped."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    OPEN,
    ROOT,
    command,
    config_file,
    environment,
    kill,
    program,
    started_by,
    wait_until_gone,
    write_tiny,
)
from left_behind import metrics, same_weights

from cosmoflow_dali.training.checkpoint import Checkpoint

TRAIN = "cosmoflow_dali.train"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 26 samples as the published files and in shards of five."""
    folder = tmp_path_factory.mktemp("data")
    published = write_tiny(folder / "published", train=26, validation=7, format_name="tfrecord_gzip")
    line = ["-i", published, "-o", folder / "packed", "--to", "packed", "--samples-per-shard", 5]
    assert program("preprocess.convert", *line).code == 0
    return {"published": published, "packed": folder / "packed"}


@pytest.mark.parametrize(
    "network", [{}, pytest.param(OPEN, marks=pytest.mark.slow)], ids=["reference", "open"]
)
def test_losses_scores_and_weights_are_those_of_the_published_files(
    network: dict[str, Any], roots: dict[str, Path], tmp_path: Path
) -> None:
    for name, data in roots.items():
        config = config_file(tmp_path / f"{name}.yaml", data, **{**network, "epochs": 2})
        done = program(TRAIN, "--config", config, "--run-dir", tmp_path / name)
        assert done.code == 0, done.err
    assert metrics(tmp_path / "packed") == metrics(tmp_path / "published")
    assert same_weights(tmp_path / "packed", tmp_path / "published")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_within_an_epoch_goes_on_exactly(
    ranks: int, roots: dict[str, Path], tmp_path: Path
) -> None:
    log = {"every": 1, "checkpoint_every": 1}
    loader = {"batch_size": 2 // ranks, "threads": 2}
    config = config_file(tmp_path / "c.yaml", roots["packed"], epochs=2, log=log, loader=loader)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert program(TRAIN, "--config", config, "--run-dir", whole, ranks=ranks).code == 0
    line = command(TRAIN, ["--config", config, "--run-dir", killed], ranks=ranks)
    running = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("checkpoints/*.pt"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    processes = [running.pid, *started_by(running.pid)]
    kill(processes)
    running.wait()
    wait_until_gone(processes)
    newest = Checkpoint.newest(killed / "checkpoints")
    assert newest is not None and newest.position.epoch < 2 and newest.position.samples > 0
    done = program(TRAIN, "--run-dir", killed, "--resume", ranks=ranks)
    assert done.code == 0, done.err
    assert metrics(killed) == metrics(whole)
    assert same_weights(killed, whole)
