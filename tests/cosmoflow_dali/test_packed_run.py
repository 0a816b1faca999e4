"""Training from packed samples: the run of the published files, and exact wherever it is stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import OPEN, ROOT, command, config_file, environment, program, write_tiny

from cosmoflow_dali.checkpoint import Checkpoint

TRAIN = "cosmoflow_dali.train"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 26 samples as the published files and in shards of five."""
    folder = tmp_path_factory.mktemp("data")
    published = write_tiny(folder / "published", train=26, validation=7, form="tfrecord_gzip")
    line = ["-i", published, "-o", folder / "packed", "--to", "packed", "--samples-per-shard", 5]
    assert program("preprocess.convert", *line).code == 0
    return {"published": published, "packed": folder / "packed"}


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    clocked = ("samples_per_s", "data_wait_ms", "step_ms")
    read = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clocked} for line in read]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.newest(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint.model


@pytest.mark.parametrize("network", [{}, OPEN], ids=["reference", "open"])
def test_losses_scores_and_weights_are_those_of_the_published_files(
    network: dict[str, Any], roots: dict[str, Path], tmp_path: Path
) -> None:
    for name, data in roots.items():
        config = config_file(tmp_path / f"{name}.yaml", data, **{**network, "epochs": 2})
        done = program(TRAIN, "--config", config, "--run-dir", tmp_path / name)
        assert done.code == 0, done.err
    assert lines(tmp_path / "packed") == lines(tmp_path / "published")
    one, other = weights(tmp_path / "packed"), weights(tmp_path / "published")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.parametrize("ranks", [1, 2])
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
    running.kill()
    running.wait()
    newest = Checkpoint.newest(killed / "checkpoints")
    assert newest is not None and newest.position.epoch == 0 and 0 < newest.position.samples < 26
    # What mpirun has started ends a moment later.
    shutil.copytree(killed, tmp_path / "resumed")
    done = program(TRAIN, "--run-dir", tmp_path / "resumed", "--resume", ranks=ranks)
    assert done.code == 0, done.err
    assert lines(tmp_path / "resumed") == lines(whole)
    one, other = weights(tmp_path / "resumed"), weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
