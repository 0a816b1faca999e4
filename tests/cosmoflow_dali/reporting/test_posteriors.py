"""Posteriors of a run: the files that it leaves, what it says about them, and that they can fail."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from helpers import OPEN, command, config_file, program, start, write_tiny
from run_artifacts import same_weights

from cosmoflow_dali.posterior.densities import ResidualGaussian
from cosmoflow_dali.posterior.fitted import Features, FittedPosteriors, PosteriorName
from cosmoflow_dali.posterior.ridge import Ridge
from cosmoflow_dali.reporting.html_report import write_report
from cosmoflow_dali.reporting.posteriors import score_posteriors, score_table, scores_to_json, verdicts

PARAMETERS = ["Omega_m", "sigma_8", "n_s", "H_0"]
ROWS = ["prior", "ridge", "summaries", "network", "joined"]
SETTINGS = OPEN | {"posterior": {"calibration": 0.5}, "epochs": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data"), train=104, validation=8, test=12)


def train(config: Path, run: Path, *more: object) -> None:
    """Train in a process of its own, with one thread."""
    process = start(command("cosmoflow_dali.train", ["--config", config, "--run-dir", run, *more]))
    assert isinstance(process, Forked)
    _, err = process.communicate(timeout=240)
    assert process.wait() == 0, err


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with posteriors."""
    folder = tmp_path_factory.mktemp("finished")
    train(config_file(folder / "c.yaml", data, **SETTINGS), folder / "run")
    return folder / "run"


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def test_run_leaves_posteriors_beside_its_checkpoint_and_their_scores(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"posterior_scores.npz", "summary.json", "report.html"} <= names
    assert (finished / "checkpoints" / "posterior.pt").is_file()
    posterior = summary_of(finished)["posterior"]
    assert (posterior["split"], posterior["samples"], posterior["universes"]) == ("test", 12, 12)
    # Of 104 universes the network sees half; the flow over its outputs is fitted to the others.
    assert posterior["fit_samples"] == {"summaries": 104, "network": 52}
    assert summary_of(finished)["steps"] == 52 // 4
    assert list(posterior["scores"]) == ROWS and posterior["best"] in ROWS
    for scores in posterior["scores"].values():
        assert list(scores["mae_per_parameter"]) == list(scores["sbc_ks_p"]) == PARAMETERS
        assert scores["mae"] == pytest.approx(np.mean(list(scores["mae_per_parameter"].values())))
        assert set(scores["coverage"]) == {"68%", "95%"}
        assert isinstance(scores["calibrated"], bool) and math.isfinite(scores["nll"])
    assert posterior["scores"]["prior"]["nll"] == pytest.approx(4 * math.log(2))
    difference = posterior["scores"]["joined"]["nll"] - posterior["scores"]["summaries"]["nll"]
    assert posterior["joined_less_summaries"]["nll"] == pytest.approx(difference)


def test_archive_has_the_scores_of_each_sample(finished: Path, data: Path) -> None:
    posterior = summary_of(finished)["posterior"]
    with np.load(finished / "posterior_scores.npz") as archive:
        targets, draws = archive["targets"], archive["draws"]
        labels = [np.load(path) for path in sorted((data / "test").glob("*_label.npy"))]
        np.testing.assert_array_equal(targets, labels)
        for name in ROWS:
            error = np.abs(archive[f"{name}/means"] - targets).mean()
            assert error == pytest.approx(posterior["scores"][name]["mae"], rel=1e-5)
            below, nearer = archive[f"{name}/below"], archive[f"{name}/nearer"]
            assert below.shape == (12, 4) and nearer.shape == (12,)
            assert min(below.min(), nearer.min()) > 0 and max(below.max(), nearer.max()) < 1
            inside = np.abs(below - 0.5) < 0.34
            coverage = [posterior["scores"][name]["coverage"]["68%"][parameter] for parameter in PARAMETERS]
            np.testing.assert_allclose(inside.mean(axis=0), coverage)
        assert draws.shape[0] == 3 and draws.shape[2] == 4 and np.abs(draws).max() <= 1


def test_report_shows_every_row_every_verdict_and_the_pictures(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert len(page) < 1_000_000
    assert "<h2>Posteriors</h2>" in page
    posterior = summary_of(finished)["posterior"]
    cells = {cell.strip() for cell in re.findall(r"<td>([^<]*)", page)}
    for row in score_table(posterior["scores"]):
        assert set(row) <= cells
    for scores in posterior["scores"].values():
        assert scores["verdict"] in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 6
    words = [" ".join(ElementTree.fromstring(picture).itertext()) for picture in pictures]
    for label in ("rank of the truth", "level of TARP's region", "predicted standard deviation", "km/s/Mpc]"):
        assert any(label in each for each in words)
    assert write_report(finished).read_text() == page


@pytest.mark.parametrize("calibrated", [True, False])
def test_report_labels_a_run_whose_posterior_fails(calibrated: bool, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    summary = summary_of(run)
    posterior = summary["posterior"]
    for name, scores in posterior["scores"].items():
        scores["calibrated"] = calibrated or name != posterior["best"]
        scores["verdict"] = "calibrated" if scores["calibrated"] else "not calibrated: TARP's area is -0.200"
    (run / "summary.json").write_text(json.dumps(summary))
    page = write_report(run).read_text()
    # Above all sections, and at the posterior's row.
    headline, _, rest = page.partition("<h2>")
    for part in (headline, rest):
        assert ("not calibrated: TARP&#x27;s area is -0.200" in part) == (not calibrated)
        assert ("<p class=failed>" in part) == (not calibrated)


def test_run_without_the_setting_has_no_posteriors(data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", data, **OPEN | {"epochs": 1})
    assert program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run").code == 0
    summary = summary_of(tmp_path / "run")
    assert summary["posterior"] is None and summary["steps"] == 104 // 4
    found = {path.name for path in (tmp_path / "run").rglob("*posterior*")}
    assert not found
    assert "osterior" not in (tmp_path / "run" / "report.html").read_text().replace("posterior: null", "")


def test_closed_division_refuses_posteriors(data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", data, posterior={})
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 1
    assert done.err.startswith("error: submission.division = closed: ") and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_test_split_of_other_samples_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(other / "test")
    write_tiny(tmp_path / "small", train=1, validation=1, test=4, size=8)
    (tmp_path / "small" / "test").rename(other / "test")
    config = config_file(tmp_path / "c.yaml", other, **SETTINGS)
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.startswith("error: model.size = ") and str(other / "test") in done.err
    assert not (tmp_path / "run").exists()


def test_instances_of_one_node_do_not_stage_different_samples(data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", data, **SETTINGS | {"loader": {"batch_size": 4}})
    line = ["--config", config, "--run-dir", tmp_path / "run", "--instances", 2]
    done = program("cosmoflow_dali.train", *line, "--set", f"data.stage.dir={tmp_path}/disk", ranks=2)
    assert done.code == 1, done.err
    assert f"error: data.stage.dir = {tmp_path}/disk: " in done.err
    assert not (tmp_path / "run").exists() and not (tmp_path / "disk").exists()


def test_scores_of_training_universes_are_labelled(finished: Path, data: Path, tmp_path: Path) -> None:
    assert summary_of(finished)["posterior"]["samples_of_training_universes"] == 0
    assert "not independent" not in (finished / "report.html").read_text()
    # Other crops of two universes of train.
    other, run = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    for index in (3, 50):
        for path in (other / "test").glob(f"universe_20{index % 12:02d}_*"):
            path.rename(path.with_name(path.name.replace(f"_20{index % 12:02d}_000", f"_{index:04d}_001")))
    config = config_file(tmp_path / "c.yaml", other, **SETTINGS)
    assert program("cosmoflow_dali.train", "--config", config, "--run-dir", run).code == 0
    posterior = summary_of(run)["posterior"]
    assert (posterior["samples_of_training_universes"], posterior["samples"]) == (2, 12)
    label = "not independent: by their names, 2 of the 12 samples are of universes in train"
    assert label in verdicts(posterior) and label in (run / "report.html").read_text()


def test_skipped_samples_of_the_fit_are_named_and_not_counted(data: Path, tmp_path: Path) -> None:
    other, run = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    damaged = [
        other / "test" / "universe_2003_000_data.npy",
        *sorted((other / "train").glob("*_data.npy"))[::8],
    ]
    for path in damaged:
        path.write_bytes(b"damaged")
    config = config_file(
        tmp_path / "c.yaml", other, **SETTINGS | {"loader": {"batch_size": 4, "on_bad_sample": "skip"}}
    )
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", run)
    assert done.code == 0, done.err
    assert all(f"skipped {path}" in done.err for path in damaged)
    posterior = summary_of(run)["posterior"]
    assert posterior["samples"] == 11 and posterior["fit_samples"]["summaries"] == 104 - 13


def test_too_few_universes_are_refused_before_training(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", tiny, **SETTINGS)
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 1
    assert done.err.startswith("error: posterior.calibration = 0.5: ") and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_posteriors_after_kill_9_during_the_fit_are_those_of_an_undisturbed_run(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path / "c.yaml", data, **SETTINGS)
    # The features of the few samples take less than the longest wait; on most machines the fit takes more.
    for seconds in (1.5, 0.7, 0.3, 0.0):
        run = tmp_path / f"run killed after {seconds} s"
        process = start(command("cosmoflow_dali.train", ["--config", config, "--run-dir", run]))
        deadline = time.monotonic() + 120
        while not list((run / "checkpoints").glob("epoch00001_*.pt")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.wait()
        if not (run / "checkpoints" / "posterior.pt").exists():
            break
    assert not (run / "checkpoints" / "posterior.pt").exists() and not (run / "summary.json").exists()
    train(config, run, "--resume")
    assert same_weights(run, finished)
    for name in ("checkpoints/posterior.pt", "posterior_scores.npz"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    one, other = (summary_of(folder)["posterior"] for folder in (run, finished))
    assert one["scores"] == other["scores"]


@pytest.mark.slow
def test_test_split_has_no_part_in_training_and_fit(data: Path, finished: Path, tmp_path: Path) -> None:
    other, run = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    shutil.rmtree(other / "test")
    train(config_file(tmp_path / "c.yaml", other, **SETTINGS), run)
    assert same_weights(run, finished)
    fits = [folder / "checkpoints" / "posterior.pt" for folder in (run, finished)]
    assert fits[0].read_bytes() == fits[1].read_bytes()
    # The report tells a reader that these samples are not as independent.
    posterior = summary_of(run)["posterior"]
    assert (posterior["split"], posterior["samples"]) == ("validation", 8)
    page = (run / "report.html").read_text()
    assert "8 validation samples" in page and "no test split" in page


@pytest.mark.slow
def test_two_ranks_fit_the_posteriors_of_one(data: Path, finished: Path, tmp_path: Path) -> None:
    # From the weights of one run: training on two ranks rounds otherwise.
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoints" / "posterior.pt").unlink()
    arguments = ["--run-dir", run, "--resume", "--set", "loader.batch_size=2"]
    done = program("cosmoflow_dali.train", *arguments, ranks=2)
    assert done.code == 0, done.err
    assert same_weights(run, finished)
    one, two = (torch.load(folder / "checkpoints" / "posterior.pt") for folder in (finished, run))
    assert one["weights"] == two["weights"]
    for name, flow in one["flows"].items():
        for key, tensor in flow.items():
            torch.testing.assert_close(two["flows"][name][key], tensor, rtol=1e-5, atol=1e-5)
    with np.load(finished / "posterior_scores.npz") as ours, np.load(run / "posterior_scores.npz") as theirs:
        np.testing.assert_array_equal(ours["targets"], theirs["targets"])
        for name in ROWS:
            np.testing.assert_allclose(ours[f"{name}/means"], theirs[f"{name}/means"], atol=1e-5)


class Gaussian(ResidualGaussian):
    """The exact posterior of `universes`, or one that is `width` times as wide and off by `shift` sigma."""

    def __init__(self, covariance: Any, width: float, shift: float) -> None:
        super().__init__(width**2 * covariance)
        self._offset = shift * np.sqrt(covariance.diagonal())

    def log_density(self, features: Any, targets: Any) -> Any:
        return super().log_density(features + self._offset, targets)

    def sample(self, features: Any, draws: int, seed: int) -> Any:
        return super().sample(features + self._offset, draws, seed)


@pytest.fixture(scope="module")
def score() -> Callable[[float, float], dict[str, Any]]:
    """Return a function that scores a Gaussian posterior of 4,096 universes as a run scores its own."""
    rng = np.random.default_rng(7)
    covariance = 0.01 * (np.full((4, 4), 0.4) + np.diag([0.6, 1.0, 2.0, 3.0]))
    predictions = rng.uniform(-0.5, 0.5, (4096, 4))
    targets = predictions + rng.multivariate_normal(np.zeros(4), covariance, 4096)
    names = tuple(f"universe_{index:04d}_000" for index in range(4096))
    features = Features(names, predictions, None, targets)
    identity = Ridge(np.zeros(4), np.eye(4), np.zeros(4))

    def score_gaussian(width: float, shift: float) -> dict[str, Any]:
        ridges: dict[PosteriorName, Ridge] = {"ridge": identity, "summaries": identity}
        flows: dict[Any, Any] = {"summaries": Gaussian(covariance, width, shift)}
        fitted = FittedPosteriors(ridges, covariance, flows)
        return scores_to_json(score_posteriors(fitted, features, seed=3), features)

    return score_gaussian


def test_perfect_posterior_is_called_calibrated(score: Callable[[float, float], dict[str, Any]]) -> None:
    result = score(1.0, 0.0)
    assert (result["samples"], result["universes"]) == (4096, 4096)
    summaries = result["scores"]["summaries"]
    assert summaries["calibrated"] is True
    limits = summaries["coverage"]["68%"]["limit"], summaries["coverage"]["95%"]["limit"]
    assert limits == pytest.approx((0.022, 0.010), abs=5e-4)
    assert summaries["tarp_area"]["limit"] == pytest.approx(0.014, abs=5e-4)
    for level, limit in zip(("68%", "95%"), limits, strict=True):
        shares = [summaries["coverage"][level][parameter] for parameter in PARAMETERS]
        np.testing.assert_allclose(shares, float(level[:2]) / 100, atol=limit)
    assert min(summaries["sbc_ks_p"].values()) > 0.0025
    assert result["scores"]["prior"]["calibrated"] is False
    assert any(line.startswith("summaries: calibrated") for line in verdicts(result))


@pytest.mark.parametrize(("width", "shift"), [(0.8, 0.0), (1.0, 0.15)], ids=["overconfident", "shifted"])
def test_wrong_posterior_is_called_not_calibrated(
    width: float, shift: float, score: Callable[[float, float], dict[str, Any]]
) -> None:
    result = score(width, shift)
    summaries = result["scores"]["summaries"]
    assert summaries["calibrated"] is False
    assert max(summaries["sbc_ks_p"].values()) < 0.0025
    if shift:
        np.testing.assert_allclose(list(summaries["bias"].values()), shift, atol=0.05)
    else:
        assert max(summaries["coverage"]["68%"][parameter] for parameter in PARAMETERS) < 0.68 - 0.022
        assert summaries["tarp_area"]["area"] < -0.014
    assert any(line.startswith("summaries: not calibrated: ") for line in verdicts(result))
    row = next(row for row in score_table(result["scores"]) if row[0] == "summaries")
    assert row[1] == f"{summaries['mae']:.3f}"
