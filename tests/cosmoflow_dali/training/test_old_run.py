"""A run that version 0.1 stopped in its second epoch: this version reads and resumes it.

`tests/data/before_0_2/expected.json` holds the results of version 0.1 for the same steps.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import DATA, program, write_tiny
from run_artifacts import metrics

OLD = DATA / "before_0_2"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of the old run."""
    return write_tiny(tmp_path_factory.mktemp("old") / "data", train=12, validation=4)


def test_resume_an_old_run(data: Path, tmp_path: Path) -> None:
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    done = program("cosmoflow_dali.train", "--run-dir", run, "--resume", "--data-dir", data)
    assert done.code == 0, done.err
    for record, expected in zip(metrics(run), EXPECTED["metrics"], strict=True):
        # Another processor may round the sums of a step differently.
        assert record.pop("mae_per_parameter", {}) == pytest.approx(
            expected.pop("mae_per_parameter", {}), rel=1e-5
        )
        assert record.pop("skipped_samples", None) == expected.pop("skipped_samples", None)
        assert record.pop("kind") == expected.pop("kind")
        assert record == pytest.approx(expected, rel=1e-5)


def test_evaluate_and_predict_with_an_old_checkpoint(data: Path) -> None:
    (weights,) = (OLD / "run" / "checkpoints").iterdir()
    done = program("cosmoflow_dali.evaluate", "--data-dir", data, "--weights", weights)
    assert done.code == 0, done.err
    scores = json.loads(done.out)
    expected = dict(EXPECTED["evaluate"])
    assert scores.pop("posterior") is None
    assert scores.pop("mae_per_parameter") == pytest.approx(expected.pop("mae_per_parameter"), rel=1e-5)
    assert scores == pytest.approx(expected, rel=1e-5)

    files = sorted((data / "validation").glob("*_data.npy"))
    done = program("cosmoflow_dali.predict", "--weights", weights, *files)
    assert done.code == 0, done.err
    for row, values in zip(csv.DictReader(io.StringIO(done.out)), EXPECTED["predict"], strict=True):
        assert {name: float(row[name]) for name in values} == pytest.approx(values, rel=1e-5)
