"""The programs evaluate and predict, compared with the results of Keras."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SIZE, config_file, program

from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig

DATA = ROOT / "tests" / "data"
WEIGHTS = DATA / "keras_small.npz"
EVALUATE, PREDICT = "cosmoflow_dali.evaluate", "cosmoflow_dali.predict"


@pytest.fixture(params=["tfrecord_gzip", "tfrecord_plain"])
def keras_data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a data folder with samples that TensorFlow wrote."""
    for split in ("train", "validation"):
        shutil.copytree(DATA / request.param, tmp_path / "data" / split)
    return tmp_path / "data"


def test_reference_weights_score_as_in_keras(keras_data: Path) -> None:
    with np.load(WEIGHTS) as keras:
        mae, mse = float(keras["mae"]), float(keras["mse"])
    for batch_size, ranks in ((4, 1), (1, 2)):
        done = program(
            EVALUATE,
            "--data-dir",
            keras_data,
            "--weights",
            WEIGHTS,
            "--batch-size",
            batch_size,
            ranks=ranks,
        )
        assert done.code == 0, done.err
        scores = json.loads(done.out)
        assert set(scores) == {"mae", "mse", "mae_per_parameter", "samples", "posterior"}
        assert scores["posterior"] is None
        assert scores["mae"] == pytest.approx(mae, abs=1e-5)
        assert scores["mse"] == pytest.approx(mse, abs=1e-5)
        assert scores["samples"] == 2
        assert np.mean(list(scores["mae_per_parameter"].values())) == pytest.approx(mae, abs=1e-5)


def test_predictions_are_those_of_keras_in_physical_units(keras_data: Path) -> None:
    files = sorted((keras_data / "train").iterdir())
    done = program(PREDICT, "--weights", WEIGHTS, *files)
    assert done.code == 0, done.err
    rows = list(csv.DictReader(io.StringIO(done.out)))
    with np.load(WEIGHTS) as keras:
        outputs = keras["outputs"]
    for row, path, output in zip(rows, files, outputs, strict=True):
        assert row["file"] == str(path)
        means = {"Omega_m": 0.3, "sigma_8": 0.8, "n_s": 0.96, "H_0": 70}
        for (name, mean), u in zip(means.items(), output, strict=True):
            assert float(row[name]) == pytest.approx(mean * (1 + 0.1 * u), rel=1e-5)
            assert row[f"{name}_standard_error_from_validation_residuals"] == ""


def test_checkpoint_has_the_scores_and_predictions_of_its_run(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", tiny, epochs=1)
    assert program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run").code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    weights = max((tmp_path / "run" / "checkpoints").iterdir())
    done = program(EVALUATE, "--data-dir", tiny, "--weights", weights, "--batch-size", 3)
    assert done.code == 0, done.err
    assert json.loads(done.out)["mae"] == pytest.approx(summary["mae"], abs=1e-6)

    files = sorted((tiny / "validation").glob("*_data.npy"))
    output = tmp_path / "out.csv"
    assert program(PREDICT, "--weights", weights, "--output", output, *files).code == 0
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(tmp_path / "run" / "predictions.csv", newline="") as file:
        expected = list(csv.DictReader(file))
    for row, other in zip(rows, expected, strict=True):
        assert float(row["sigma_8"]) == pytest.approx(float(other["sigma_8_pred"]), rel=1e-5)
    residuals = [float(row["sigma_8_pred"]) - float(row["sigma_8_true"]) for row in expected]
    rms = np.sqrt(np.mean(np.square(residuals)))
    error = float(rows[0]["sigma_8_standard_error_from_validation_residuals"])
    assert error == pytest.approx(rms, rel=1e-4)


def test_unsuitable_arguments_are_one_line(tiny: Path) -> None:
    for arguments, subject in (
        (["--weights", "nothing.pt"], "nothing.pt: "),
        (["--weights", "README.md"], "README.md: "),
        (["--weights", WEIGHTS, "--batch-size", "0"], "batch_size = 0: "),
        (["--weights", WEIGHTS], f"{tiny}/validation: has a size of {SIZE} voxels"),
    ):
        done = program(EVALUATE, "--data-dir", tiny, *arguments)
        assert done.code == 1
        assert done.err.startswith(f"error: {subject}") and done.err.count("\n") == 1


def test_training_reads_what_tensorflow_wrote(keras_data: Path, tmp_path: Path) -> None:
    model = {"size": 32, "blocks": 2, "filters": 2, "dense": [8, 4], "dropout": 0.0}
    changes = {"loader": {"batch_size": 2}, "log": {"every": 1}, "epochs": 1, "seed": 3}
    config = config_file(tmp_path / "c.yaml", keras_data, model=model, **changes)
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    # The loss of the untrained network on the counts that Keras read.
    with np.load(WEIGHTS) as keras:
        counts, targets = keras["counts"], torch.from_numpy(keras["targets"])
    volume = torch.from_numpy(np.log1p(counts.astype(np.float32))).permute(0, 4, 1, 2, 3)
    untrained = CosmoFlow(ReferenceConfig(size=32, blocks=2, filters=2, dense=(8, 4), dropout=0.0), seed=3)
    expected = (untrained(volume) - targets).square().mean().item()
    assert first["loss"] == pytest.approx(expected, abs=1e-6)
