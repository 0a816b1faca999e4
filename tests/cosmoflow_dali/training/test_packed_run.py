"""Training on packed samples: equal to training on the published files, and exact after a kill."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from helpers import OPEN, Ranks, command, config_file, program, write_tiny
from run_artifacts import metrics, same_weights

from cosmoflow_dali.training.checkpoint import Checkpoint

TRAIN = "cosmoflow_dali.train"


@pytest.mark.parametrize(
    ("network", "ranks"),
    [
        ({}, 1),
        pytest.param({}, 2, marks=pytest.mark.slow),
        pytest.param(OPEN, 1, marks=pytest.mark.slow),
    ],
)
def test_packed_run_equals_the_published_files_and_resumes_exactly(
    network: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    # The same 26 samples as published and in shards of five.
    published = write_tiny(tmp_path / "published", train=26, validation=7, format_name="tfrecord_gzip")
    packed, killed = tmp_path / "packed", tmp_path / "killed"
    line = ["-i", published, "-o", packed, "--to", "packed", "--samples-per-shard", 5]
    assert program("preprocess.convert", *line).code == 0
    changes = network | {
        "epochs": 2,
        "log": {"every": 1, "checkpoint_every": 1},
        "loader": {"batch_size": 2 // ranks, "threads": 2},
    }
    for data in (published, packed):
        config = config_file(tmp_path / f"{data.name}.yaml", data, **changes)
        done = program(TRAIN, "--config", config, "--run-dir", tmp_path / f"{data.name} run", ranks=ranks)
        assert done.code == 0, done.err
    whole = tmp_path / "packed run"
    assert metrics(whole) == metrics(tmp_path / "published run")
    assert same_weights(whole, tmp_path / "published run")

    config = tmp_path / "packed.yaml"
    with Ranks(command(TRAIN, ["--config", config, "--run-dir", killed]), range(ranks), ranks):
        deadline = time.monotonic() + 120
        while len(list(killed.glob("checkpoints/*.pt"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
    newest = Checkpoint.newest(killed / "checkpoints")
    assert newest is not None and newest.position.epoch < 2 and newest.position.samples > 0
    done = program(TRAIN, "--run-dir", killed, "--resume", ranks=ranks)
    assert done.code == 0, done.err
    assert metrics(killed) == metrics(whole)
    assert same_weights(killed, whole)
