"""The program baseline, on samples whose true dependence is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers import program, tiny_sample, write_tiny

from pipelines.formats.registry import FORMATS
from pipelines.sample import PARAMETERS

BASELINE = "cosmoflow_dali.baseline"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set where sigma_8 sets the field's variance, and the others do nothing."""
    return write_tiny(tmp_path_factory.mktemp("baseline") / "data", train=300, validation=100, size=8)


def test_scores_the_prior_the_ridge_and_the_flow(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    done = program(BASELINE, data, "--output", output)
    assert done.code == 0, done.err
    result = json.loads(output.read_text())
    assert (result["split"], result["samples"], result["universes"]) == ("validation", 100, 100)
    prior, ridge, flow = (result["scores"][name] for name in ("prior", "ridge", "summaries"))
    assert prior["nll"] == pytest.approx(4 * math.log(2))
    assert prior["mae"] == pytest.approx(0.5, abs=0.05)
    for fitted in (ridge, flow):
        assert fitted["mae_per_parameter"]["sigma_8"] < 0.2
        assert fitted["mae_per_parameter"]["n_s"] > 0.4
        assert set(fitted["coverage"]["68%"]) == {"limit", *(parameter.name for parameter in PARAMETERS)}
    # It knows sigma_8 about ten times as well as the prior, and that the others are uniform in the box.
    assert flow["nll"] < ridge["nll"] < prior["nll"] - 0.5
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["MAE", "prior", "ridge,", "summaries"]
    assert lines[-3].startswith("prior: not calibrated: TARP")


def test_scores_the_test_split_if_there_is_one(data: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / split).symlink_to(data / split)
    (tmp_path / "test").mkdir()
    for index in range(2000, 2060):
        FORMATS["npy"].write(tmp_path / "test", f"universe_{index:04d}_000", tiny_sample(index, 8))
    done = program(BASELINE, tmp_path, "--output", tmp_path / "scores.json")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "scores.json").read_text())
    assert (result["split"], result["samples"]) == ("test", 60)


def test_refuses_sets_that_are_too_small_or_differ_in_one_line(data: Path, tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small", train=3, validation=3, size=8)
    other = write_tiny(tmp_path / "other", train=1, validation=60, size=4)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/train").symlink_to(data / "train")
    (tmp_path / "mixed/validation").symlink_to(other / "validation")
    sample = next((data / "train").glob("*_data.npy"))
    for words, named in (
        ((small,), small / "train"),
        ((tmp_path / "mixed",), tmp_path / "mixed/validation"),
        ((tmp_path / "nothing",), tmp_path / "nothing/train"),
        ((data, "--output", sample), sample),
        ((data, "--seed", -1), "--seed -1"),
    ):
        done = program(BASELINE, *words)
        assert done.code == 1
        assert len(done.err.splitlines()) == 1
        assert str(named) in done.err
