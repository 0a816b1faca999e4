"""The simulator as a program: reproducible bytes, and errors in one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, environment, inline_workers, program, run

from pipelines.dataset.open import open_folder, open_path
from pipelines.errors import DataError
from pipelines.formats.registry import FORMATS
from preprocess.simulate import main, make_dataset
from preprocess.simulator.cosmology import PowerSpectrum
from preprocess.simulator.nbody import linear_modes
from preprocess.simulator.universe import SimulateConfig, simulate_universe

SIMULATE = "preprocess.simulate"
SMALL = SimulateConfig(train=3, validation=2)
SMALL_FLAGS = ["--train", "3", "--validation", "2"]


def digests(root: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `root`, by name."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of three and two universes, made by one worker."""
    root = tmp_path_factory.mktemp("made")
    make_dataset(SMALL, root, workers=1, shown=False)
    return root


def test_published_format_and_names(made: Path) -> None:
    for split, count in (("train", 3), ("validation", 2)):
        found = open_folder(made / split)
        assert (found.format_name, len(found), found.spec.shape) == ("tfrecord_gzip", count, (32, 32, 32, 4))
        for index in range(count):
            sample = found.read(index)
            assert np.abs(sample.target).max() <= 1
            # Each particle is in one voxel, at every redshift.
            assert (sample.counts.sum(axis=(0, 1, 2), dtype=np.int64) == 32**3).all()
            # z = 0 comes first, and clustering grows with time.
            assert (np.diff(sample.counts.var(axis=(0, 1, 2))) < 0).all()


def test_number_of_workers_changes_no_byte(made: Path, tmp_path: Path) -> None:
    make_dataset(SMALL, tmp_path / "three", workers=3, shown=False)
    assert digests(tmp_path / "three") == digests(made)


def test_workers_that_do_not_fit_into_the_memory_are_not_started(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("preprocess.simulate.available_memory", lambda: 2 * SMALL.memory + 1)
    with inline_workers("preprocess.simulate"):
        make_dataset(SMALL, tmp_path, workers=8, shown=True)
    assert "2 of 8 worker processes" in capsys.readouterr().err
    assert digests(tmp_path) == digests(made)
    # Two bytes for each of 512^3 particles' four counts are the least that is held.
    assert SimulateConfig(size=512).memory > 8 * 512**3


def test_missing_samples_are_made_and_a_folder_can_grow(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    with inline_workers("preprocess.simulate"):
        make_dataset(SimulateConfig(train=1, validation=2), root, workers=2, shown=False)
        make_dataset(SMALL, root, workers=2, shown=False)
        next((root / "train").glob("*.tfrecord")).unlink()
        (root / "train" / ".univ_a0000000_000.tfrecord.1.tmp").write_bytes(b"half")
        make_dataset(SMALL, root, workers=2, shown=False)
    assert digests(root) == digests(made)


def test_a_test_split_joins_an_older_folder_and_changes_nothing_else(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(made, root)
    settings = json.loads((root / "simulation.json").read_text())
    # As an earlier version recorded them.
    del settings["test"]
    (root / "simulation.json").write_text(json.dumps(settings))
    with inline_workers("preprocess.simulate"):
        make_dataset(replace(SMALL, test=2), root, workers=2, shown=False)
        made_once = digests(root)
        # A run, which asks for no test universes, makes no others and forgets none.
        make_dataset(SMALL, root, workers=2, shown=False)
        make_dataset(replace(SMALL, train=4), root, workers=2, shown=False)
    assert json.loads((root / "simulation.json").read_text())["test"] == 2
    new = {name for name in made_once if name not in digests(made)}
    assert new == {f"test/univ_c{universe:07d}_000.tfrecord" for universe in range(2)}
    before = {name: value for name, value in made_once.items() if name != "simulation.json"}
    assert before.items() <= digests(root).items()
    targets = [sample.target.tobytes() for found in open_path(root) for sample in map(found.read, range(2))]
    assert len(set(targets)) == 6
    assert not (made / "test").exists()


@pytest.mark.slow
def test_rerun_completes_a_killed_simulation(tmp_path: Path) -> None:
    def line(root: Path) -> list[str]:
        options = ["--train", "40", "--validation", "4", "--workers", "2", "-o", str(root)]
        return [sys.executable, "-m", SIMULATE, *options]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(line(whole)).code == 0
    process = subprocess.Popen(line(killed), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("train/univ*"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    present = digests(killed)
    assert 8 <= len([name for name in present if name.startswith("train/univ")]) < 40
    assert all(digest == digests(whole)[name] for name, digest in present.items() if "/univ" in name)
    done = run(line(killed))
    assert done.code == 0, done.err
    assert digests(killed) == digests(whole)


def test_universes_are_distinct(made: Path) -> None:
    samples = [open_folder(made / split) for split in ("train", "validation")]
    every = [split.read(index) for split in samples for index in range(len(split))]
    for one, other in itertools.combinations(every, 2):
        assert not np.allclose(one.target, other.target, atol=1e-4)
        # Fields with the same initial conditions would correlate.
        first, second = (np.log1p(sample.counts[..., 0].astype(float)).ravel() for sample in (one, other))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    stems = [split.sample_id(index) for split in samples for index in range(len(split))]
    assert len(set(stems)) == len(stems)


def test_crops_are_the_box_cut_in_c_order() -> None:
    config = SimulateConfig(train=1, validation=0, size=32, crops=2)
    crops = dict(simulate_universe(config, "train", 0))
    assert [stem[-3:] for stem in crops] == [f"{crop:03d}" for crop in range(8)]
    box = np.zeros((64, 64, 64, 4), np.int16)
    places = itertools.product((0, 32), repeat=3)
    for sample, (i, j, k) in zip(crops.values(), places, strict=True):
        box[i : i + 32, j : j + 32, k : k + 32] = sample.counts
    assert (box.sum(axis=(0, 1, 2), dtype=np.int64) == 64**3).all()
    # The same seed gives the same universe as one sample.
    ((_, whole),) = simulate_universe(replace(config, size=64, crops=1), "train", 0)
    assert np.array_equal(whole.counts, box)
    assert {sample.target.tobytes() for sample in crops.values()} == {whole.target.tobytes()}
    # A crop's edge is not the box's edge: neighbours across the seam correlate.
    field = np.log1p(box[..., 0].astype(float))
    seam = np.corrcoef(field[31].ravel(), field[32].ravel())[0, 1]
    apart = np.corrcoef(field[0].ravel(), field[31].ravel())[0, 1]
    assert seam > 0.2 > abs(apart)


def test_a_universe_is_that_of_earlier_versions() -> None:
    """Compare the voxels with 0, 1, ... and 7 or more particles with those that were recorded for version 1.

    Another processor may round differently, and move a few particles across the edge of a voxel.
    """
    recorded = [
        [129022, 85591, 24730, 9283, 4570, 2575, 1638, 4735],
        [110658, 100781, 29048, 10078, 4495, 2390, 1422, 3272],
        [80586, 130749, 34335, 9567, 3916, 1492, 708, 791],
        [56072, 162787, 34178, 6421, 1993, 468, 166, 59],
    ]
    config, found = SimulateConfig(train=1, validation=0, crops=2, steps=6), np.zeros((4, 8), int)
    for _, sample in simulate_universe(config, "train", 0):
        voxels = np.minimum(sample.counts, 7).reshape(-1, 4)
        found += [np.bincount(channel, minlength=8) for channel in voxels.T]
    np.testing.assert_allclose(found, recorded, atol=20)


def test_box_grows_with_h_0() -> None:
    # In the published set the box is 512 H_0 / 70 Mpc/h wide.
    boxes = []

    def spy(spectrum: PowerSpectrum, size: int, box: float, rng: np.random.Generator) -> torch.Tensor:
        boxes.append(box)
        return linear_modes(spectrum, size, box, rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.simulator.universe.linear_modes", spy)
        for universe in range(3):
            ((_, sample),) = simulate_universe(SMALL, "train", universe)
            assert boxes[-1] == pytest.approx(32 * 4.0 * (1 + 0.1 * sample.target[3]), rel=1e-6)


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_any_format_holds_the_same_universes(format_name: str, made: Path, tmp_path: Path) -> None:
    with inline_workers("preprocess.simulate"):
        config = SimulateConfig(train=1, validation=1, format=format_name)
        make_dataset(config, tmp_path, workers=1, shown=False)
    found, published = open_folder(tmp_path / "train"), open_folder(made / "train")
    assert found.format_name == format_name
    np.testing.assert_array_equal(found.read(0).counts, published.read(0).counts)


def test_complete_folder_is_unchanged(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    done = program(SIMULATE, "--train", 3, "--validation", 2, "-o", made)
    assert done.code == 0 and "complete" in done.out
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "1"], "seed"),
        (["--voxel", "2"], "voxel"),
        (["--steps", "8"], "steps"),
        (["--train", "2"], "train"),
        (["--format", "npy"], "format"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    flags: list[str], said: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*SMALL_FLAGS, *flags, "-o", str(made)])
    assert end.value.code == 1
    line = capsys.readouterr().err
    assert f"simulate.{said}" in line and len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--size", "33"], "size = 33"),
        (["--steps", "3"], "steps = 3"),
        (["--voxel", "-1"], "voxel = -1.0"),
        (["--voxel", "nan"], "voxel = .nan"),
        (["--crops", "0"], "crops = 0"),
        (["--crops", "5", "--size", "256"], "crops = 5"),
        (["--train", "-1"], "train = -1"),
        (["--seed", "-1"], "seed = -1"),
        (["--format", "hdf5"], "format = hdf5"),
        (["--workers", "0"], "workers = 0"),
    ],
)
def test_invalid_settings_are_refused(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*SMALL_FLAGS, *flags, "-o", str(tmp_path / "new")])
    assert end.value.code == 1
    line = capsys.readouterr().err
    assert said in line and len(line.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_folder_with_other_content_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "precious.tfrecord").write_bytes(b"x")
    with pytest.raises(DataError) as error:
        make_dataset(SMALL, tmp_path, workers=1, shown=False)
    assert error.value.path == str(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError) as error:
        make_dataset(SMALL, tmp_path / "file", workers=1, shown=False)
    assert error.value.path == str(tmp_path / "file" / "train")


def test_record_holds_the_settings(made: Path) -> None:
    record = json.loads((made / "simulation.json").read_text())
    assert (record["train"], record["seed"], record["voxel"]) == (3, 0, 4.0)
