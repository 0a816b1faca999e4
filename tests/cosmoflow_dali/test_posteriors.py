"""Posteriors beside the weights of a run, as the programs predict and evaluate use them."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from itertools import combinations
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import DATA, Done, command, config_file, program, run, tiny_sample, write_tiny

from cosmoflow_dali.posterior.fitted import fit_posteriors
from cosmoflow_dali.posterior.flow import FlowPosterior
from cosmoflow_dali.posterior.summaries import num_basic_summaries
from cosmoflow_dali.reporting.read_features import Network, describe, read_features
from cosmoflow_dali.training.posterior_file import load_posteriors, save_posteriors
from cosmoflow_dali.training.pretrained import load_model
from pipelines.dataset.open import open_folder
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.formats.registry import FORMATS
from pipelines.loading.reader import Reader

EVALUATE, PREDICT = "cosmoflow_dali.evaluate", "cosmoflow_dali.predict"
NAMES = ["Omega_m", "sigma_8", "n_s", "H_0"]
LOW, HIGH = np.array([0.27, 0.72, 0.864, 63.0]), np.array([0.33, 0.88, 1.056, 77.0])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with posteriors beside it, which have not seen the validation split."""
    root = tmp_path_factory.mktemp("posteriors")
    data = write_tiny(root / "data", train=60, validation=12)
    config = config_file(root / "c.yaml", data, epochs=1)
    assert program("cosmoflow_dali.train", "--config", config, "--run-dir", root / "run").code == 0
    weights = max((root / "run" / "checkpoints").iterdir())
    loaded, train = load_model(weights), open_folder(data / "train")
    features = read_features(Reader(train), Network(loaded.model, loaded.apply_log), Session(World()))
    assert features is not None
    fitted = fit_posteriors(None, features, num_basic_summaries(train.spec), seed=0)
    save_posteriors(weights.parent, fitted, loaded.model)
    return weights


@pytest.fixture(scope="module")
def samples(weights: Path) -> Path:
    return weights.parents[2] / "data" / "validation"


@pytest.fixture(scope="module")
def written(weights: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all outputs for `samples`: out.csv, draws.npz, draws.h5 and chains/."""
    folder = tmp_path_factory.mktemp("written")
    line = ["--weights", weights, "--samples", 400, samples]
    outputs = ["--output", folder / "out.csv", "--chains", folder / "chains"]
    assert program(PREDICT, *line, *outputs, "--draws", folder / "draws.npz").code == 0
    assert program(PREDICT, *line, "--draws", folder / "draws.h5").code == 0
    return folder


def draws_of(folder: Path) -> np.ndarray:
    with np.load(folder / "draws.npz") as archive:
        return archive["draws"]


def test_the_archive_holds_draws_within_the_box(written: Path, samples: Path) -> None:
    with np.load(written / "draws.npz") as archive:
        draws = archive["draws"]
        assert draws.dtype == np.float32 and draws.shape == (12, 400, 4)
        assert list(archive["path"]) == sorted(map(str, samples.glob("*_data.npy")))
        assert list(archive["sample_id"]) == [f"universe_{index}_000" for index in range(1000, 1012)]
        assert list(archive["parameter"]) == NAMES
        assert list(archive["unit"]) == ["", "", "", "km/s/Mpc"]
    assert (draws.astype(np.float64) >= LOW).all() and (draws.astype(np.float64) <= HIGH).all()
    # sigma_8 is what these samples depend on.
    truth = [0.8 * (1 + 0.1 * tiny_sample(index).target[1]) for index in range(1000, 1012)]
    assert np.corrcoef(draws[:, :, 1].mean(axis=1), truth)[0, 1] > 0.8


def test_rounding_moves_no_draw_out_of_the_box(
    weights: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As float32, most of the box's bounds are outside of it.
    edges = np.array([[-1.0] * 4, [1.0] * 4])
    monkeypatch.setattr(FlowPosterior, "sample_each", lambda *_: np.repeat(edges[None], 12, axis=0))
    line = ["--weights", weights, "--samples", 2, "--draws", tmp_path / "draws.npz", samples]
    assert program(PREDICT, *line).code == 0
    draws = draws_of(tmp_path).astype(np.float64)
    assert (draws >= LOW).all() and (draws <= HIGH).all()


def test_hdf5_holds_the_same_as_the_archive(written: Path) -> None:
    with np.load(written / "draws.npz") as archive, h5py.File(written / "draws.h5") as file:
        assert set(file) == set(archive)
        np.testing.assert_array_equal(file["draws"], archive["draws"])
        for key in ("path", "sample_id", "parameter", "unit"):
            assert list(file[key].asstr()) == list(archive[key])


def test_the_table_has_the_statistics_of_the_draws(written: Path) -> None:
    with open(written / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, draws in zip(rows, draws_of(written).astype(np.float64), strict=True):
        for name, values in zip(NAMES, draws.T, strict=True):
            assert float(row[f"{name}_mean"]) == pytest.approx(values.mean(), rel=1e-6)
            assert float(row[f"{name}_std"]) == pytest.approx(values.std(ddof=1), rel=1e-5)
            for percent in ("2.5", "16", "50", "84", "97.5"):
                expected = np.percentile(values, float(percent))
                assert float(row[f"{name}_q{percent}"]) == pytest.approx(expected, rel=1e-6)
        for first, second in combinations(range(4), 2):
            expected = np.cov(draws[:, first], draws[:, second])[0, 1]
            found = float(row[f"cov_{NAMES[first]}_{NAMES[second]}"])
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_chains_have_the_layout_of_getdist(written: Path, weights: Path, samples: Path) -> None:
    # https://getdist.readthedocs.io/en/latest/intro.html
    chains, draws = written / "chains", draws_of(written)
    assert len(list(chains.iterdir())) == 3 * len(draws)
    root = "universe_1003_000"
    chain = np.loadtxt(chains / f"{root}_1.txt")
    assert (chain[:, 0] == 1).all()
    np.testing.assert_allclose(chain[:, 2:], draws[3], rtol=1e-6)
    lines = [line.split() for line in (chains / f"{root}.paramnames").read_text().splitlines()]
    assert lines == [["Omega_m", r"\Omega_m"], ["sigma_8", r"\sigma_8"], ["n_s", "n_s"], ["H_0", "H_0"]]
    ranges = [line.split() for line in (chains / f"{root}.ranges").read_text().splitlines()]
    assert [name for name, _, _ in ranges] == NAMES
    np.testing.assert_allclose([(float(low), float(high)) for _, low, high in ranges], np.c_[LOW, HIGH])
    # The density per product of the parameters' units.
    loaded, split = load_model(weights), open_folder(samples)
    fitted = load_posteriors(weights, loaded.model)
    features = describe(split, {3: split.read(3)}, Network(loaded.model, loaded.apply_log))
    posterior, numbers = fitted.conditioned(fitted.best, features)
    half = (HIGH - LOW) / 2
    some = chain[::40, 2:]
    density = posterior.log_density(numbers.repeat(len(some), axis=0), (some - (LOW + HIGH) / 2) / half)
    np.testing.assert_allclose(-chain[::40, 1], density - np.log(half).sum(), atol=2e-2)


def test_draws_depend_on_the_seed_and_the_sample_alone(
    written: Path, weights: Path, samples: Path, tmp_path: Path
) -> None:
    shutil.copytree(samples, tmp_path / "in")
    line = ["--weights", weights, "--samples", 400, "--draws", tmp_path / "draws.npz"]
    part = sorted((tmp_path / "in").glob("*_data.npy"))[5:3:-1]
    assert program(PREDICT, *line, *part).code == 0
    np.testing.assert_allclose(draws_of(tmp_path), draws_of(written)[5:3:-1], rtol=1e-5)
    assert program(PREDICT, *line, "--seed", 1, *part).code == 0
    assert (draws_of(tmp_path) != draws_of(written)[5:3:-1]).mean() > 0.99


def test_lines_are_those_of_standard_output(written: Path, weights: Path, samples: Path) -> None:
    done = program(PREDICT, "--weights", weights, "--samples", 400, samples)
    assert done.code == 0 and done.out.splitlines() == (written / "out.csv").read_text().splitlines()
    plain = list(csv.DictReader(io.StringIO(program(PREDICT, "--weights", weights, samples).out)))
    assert [row["file"] for row in plain] == [row["file"] for row in csv.DictReader(io.StringIO(done.out))]


def refused(done: Done, text: object) -> bool:
    """Return True if `done` is a refusal in one line that begins with `text`, without a result."""
    return done.code == 1 and done.err.startswith(f"error: {text}") and done.err.count("\n") == 1


def test_unsuitable_options_are_refused_in_one_line(weights: Path, samples: Path, tmp_path: Path) -> None:
    for options, text in (
        (["--draws", tmp_path / "a.npz"], "--draws needs --samples"),
        (["--chains", tmp_path / "a"], "--chains needs --samples"),
        (["--seed", 1], "--seed needs --samples"),
        (["--samples", 1], "--samples 1: "),
        (["--samples", 9, "--seed", -1], "--seed -1: "),
        (["--samples", 9, "--draws", tmp_path / "a.txt"], f"--draws {tmp_path}/a.txt: "),
        (
            ["--samples", 9, "--draws", tmp_path / "a.h5", "--output", tmp_path / "a.h5"],
            f"--draws {tmp_path}/a.h5: ",
        ),
        (
            ["--samples", 9, "--chains", tmp_path / "a", "--output", tmp_path / "a" / "out.csv"],
            f"--output {tmp_path}/a/out.csv: ",
        ),
        (["--samples", 9, "--chains", samples], f"{samples}: "),
        (["--samples", 9, "--draws", tmp_path / "no" / "a.npz"], f"{tmp_path}/no/a.npz: "),
        (["--samples", 9, "--chains", tmp_path / "no" / "a"], f"{tmp_path}/no/a: "),
    ):
        assert refused(program(PREDICT, "--weights", weights, *options, samples), text), text
    assert not list(tmp_path.iterdir())


def test_weights_without_posteriors_are_refused(weights: Path, samples: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(weights, tmp_path / "alone.pt"))
    for path, posterior in ((alone, tmp_path), (DATA / "keras_small.npz", DATA)):
        done = program(PREDICT, "--weights", path, "--samples", 9, samples)
        assert refused(done, posterior / "posterior.pt")
        assert not done.out


def test_no_input_is_overwritten(weights: Path, samples: Path, tmp_path: Path) -> None:
    posterior = weights.parent / "posterior.pt"
    inputs = [next(samples.glob("*_data.npy")), weights, posterior]
    before = [path.read_bytes() for path in inputs]
    for number, path in enumerate(inputs):
        (tmp_path / f"{number}.npz").hardlink_to(path)
        for option in ("--draws", "--output"):
            output = tmp_path / f"{number}.npz"
            done = program(PREDICT, "--weights", weights, "--samples", 9, option, output, samples)
            assert refused(done, output)
    assert [path.read_bytes() for path in inputs] == before


def test_outputs_are_complete_or_not_there(weights: Path, samples: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    shutil.copytree(samples, inputs)
    (inputs / "universe_1007_000_data.npy").write_bytes(b"damaged")
    outputs = {"--draws": "draws.npz", "--chains": "chains", "--output": "out.csv"}
    line = [word for option, name in outputs.items() for word in (option, tmp_path / name)]
    done = program(PREDICT, "--weights", weights, "--samples", 9, *line, inputs)
    assert refused(done, inputs / "universe_1007_000_data.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_chains_of_one_name_are_refused(weights: Path, samples: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        FORMATS["npy"].write(tmp_path / folder, "same", tiny_sample(1))
    line = ["--weights", weights, "--samples", 9, tmp_path / "a", tmp_path / "b"]
    done = program(PREDICT, *line, "--chains", tmp_path / "chains")
    assert refused(done, tmp_path / "b" / "same_data.npy")
    assert not (tmp_path / "chains").exists()
    assert program(PREDICT, *line, "--draws", tmp_path / "draws.npz").code == 0
    first, second = draws_of(tmp_path)
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_evaluate_scores_the_posteriors(weights: Path) -> None:
    line = ["--data-dir", weights.parents[2] / "data", "--weights", weights]
    alone, ranks = (program(EVALUATE, *line, ranks=number) for number in (1, 2))
    assert (alone.code, ranks.code) == (0, 0), alone.err + ranks.err
    result, other = json.loads(alone.out), json.loads(ranks.out)
    assert result["samples"] == result["posterior"]["samples"] == 12
    assert list(result["posterior"]["scores"]) == ["prior", "ridge", "summaries", "network", "joined"]
    for name, scores in result["posterior"]["scores"].items():
        assert scores["nll"] == pytest.approx(other["posterior"]["scores"][name]["nll"], abs=1e-4)
        assert set(scores["bias_standard_error"]) == set(NAMES)
    assert result["posterior"]["scores"]["prior"]["nll"] == pytest.approx(4 * math.log(2))
    assert "against" not in result and "shift" not in result


def test_posteriors_of_other_weights_are_not_scored(weights: Path, tmp_path: Path) -> None:
    data = weights.parents[2] / "data"
    alone = Path(shutil.copy(weights, tmp_path / "alone.pt"))
    done = program(EVALUATE, "--data-dir", data, "--weights", alone)
    assert json.loads(done.out)["posterior"] is None and not done.err
    # An earlier checkpoint of the same run.
    folder = weights.parent
    other = min(folder.glob("epoch*"))
    assert other != weights
    line = command(EVALUATE, ["--data-dir", data, "--weights", other, "--against", data])
    process = run(line)
    result = json.loads(process.out)
    assert result["posterior"] is None and result["against"]["posterior"] is None and result["shift"] is None
    assert result["against"]["mae"] == result["mae"]
    assert process.err.startswith(f"{folder / 'posterior.pt'}: ") and process.err.count("\n") == 1


def test_evaluate_compares_samples_of_both_sets(weights: Path, samples: Path, tmp_path: Path) -> None:
    shutil.copytree(samples, tmp_path / "near" / "validation")
    shutil.copytree(samples, tmp_path / "far" / "validation")
    for path in (tmp_path / "far" / "validation").iterdir():
        path.rename(path.with_name(path.name.replace("universe", "other")))
    # One sample of another target, and one that is in neither set.
    np.save(tmp_path / "near" / "validation" / "universe_1000_000_label.npy", tiny_sample(5).target)
    FORMATS["npy"].write(tmp_path / "near" / "validation", "universe_1_000", tiny_sample(1))
    line = ["--data-dir", samples.parent, "--weights", weights, "--against"]
    done = program(EVALUATE, *line, tmp_path / "near")
    result = json.loads(done.out)
    assert result["samples"] == 12 and result["against"]["samples"] == 13
    assert result["against"]["posterior"]["samples"] == 13
    assert (result["shift"]["pairs"], result["shift"]["universes"]) == (11, 11)
    assert set(result["shift"]["posteriors"]) == {"ridge", "summaries", "network", "joined"}
    # The counts are the same, so that only the draws differ.
    assert all(abs(each["shift"]) < 0.1 for each in result["shift"]["posteriors"]["joined"].values())
    assert "11 samples of both sets" in done.err
    assert json.loads(program(EVALUATE, *line, tmp_path / "far").out)["shift"] is None
