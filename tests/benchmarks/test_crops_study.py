"""crops_study: averages over crops, standard errors, and the study in its smallest form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import crops_study
from benchmarks.crops_summary import (
    Predictions,
    average,
    correct,
    correlations,
    mean_and_error,
    predictions_path,
    slopes,
)


def test_the_correction_undoes_what_is_linear() -> None:
    # Outputs for crops that are half of the truth, with errors that cancel in the average.
    generator = np.random.default_rng(0)
    targets = generator.uniform(-1, 1, (2, 64, 4))
    noise = np.array([0.3, -0.3])[:, None]
    validation, test = (Predictions(0.5 * truth[:, None] + 0.1 + noise, truth) for truth in targets)
    np.testing.assert_allclose(average(test), 0.5 * test.targets + 0.1, atol=1e-12)
    np.testing.assert_allclose(correct(validation, test), test.targets, atol=1e-12)


def test_standard_errors_are_those_of_universes_and_not_of_runs() -> None:
    # Three seeds with the same errors say no more than one.
    errors = np.random.default_rng(0).random((1, 400, 4))
    one, three = mean_and_error(errors), mean_and_error(np.repeat(errors, 3, axis=0))
    assert one["error"] == pytest.approx(three["error"])
    assert one["error"][:4] == pytest.approx(np.full(4, 12**-0.5 / 20), rel=0.1)
    assert one["mean"][4] == pytest.approx(np.mean(one["mean"][:4])) == pytest.approx(one["seeds"][0])
    # Parameters are independent here, so that their average has half the error.
    assert one["error"][4] == pytest.approx(one["error"][0] / 2, rel=0.15)


def test_slopes_and_correlations_tell_of_the_shared_part_of_the_errors(tmp_path: Path) -> None:
    # Errors have a part of variance 0.03 that the crops of a universe share, and one of 0.01.
    generator = np.random.default_rng(0)
    targets = generator.uniform(-1, 1, (4000, 4))
    shared, own = generator.normal(size=(4000, 1, 4)), generator.normal(size=(4000, 2, 4))
    outputs = targets[:, None] + 0.03**0.5 * shared + 0.1 * own
    np.savez(predictions_path(tmp_path, "crops", "test"), outputs=outputs, targets=targets)
    assert correlations([tmp_path, tmp_path]) == pytest.approx([0.75] * 4, abs=0.03)
    np.savez(predictions_path(tmp_path, "crops", "test"), outputs=0.5 * targets[:, None], targets=targets)
    assert slopes([tmp_path], "crops") == pytest.approx([2.0] * 4)


@pytest.mark.slow
def test_the_study_trains_and_scores_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    box = replace(crops_study.BOX, train=16, validation=8, test=8)
    data = {"boxes": box, "crops": replace(box, size=32, crops=2)}
    monkeypatch.setattr(crops_study, "DATA", data)
    monkeypatch.setattr(crops_study, "EPOCHS", 1)
    flags = ["--data-dir", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--seeds", "3"]
    flags += [
        "--universes",
        "8",
        "--output",
        str(tmp_path / "out"),
        "--picture",
        str(tmp_path / "a.png"),
    ]
    crops_study.main(flags)
    (path,) = (tmp_path / "out").iterdir()
    results = json.loads(path.read_text())["results"]
    crops, boxes = (results["8"][name]["errors"] for name in ("crops", "boxes"))
    difference = np.subtract(boxes["box"]["mean"], crops["crops"]["mean"])
    assert boxes["box less crops"]["mean"] == pytest.approx(difference)
    # The network of crops also sees whole boxes.
    assert {"one crop", "crops", "crops, corrected", "box", "box, corrected"} < set(crops)
    assert (tmp_path / "a.png").stat().st_size > 0
    # Finished runs are kept.
    capsys.readouterr()
    crops_study.main(flags[:-4])
    assert "epoch" not in capsys.readouterr().out
