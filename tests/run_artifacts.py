"""Files that a run leaves, read for comparison with another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cosmoflow_dali.training.checkpoint import Checkpoint


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint."""
    checkpoint = Checkpoint.newest(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint.model


def same_weights(one: Path, other: Path) -> bool:
    """Return whether the weights of two runs are equal to the last bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without times."""
    clocked = ("time_ms", "samples_per_s", "data_wait_ms", "step_ms")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clocked} for line in lines]
