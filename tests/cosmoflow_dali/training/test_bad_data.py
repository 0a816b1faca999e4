"""Damaged samples in the trainer, evaluate and predict: one line that names the file, or skipped."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DATA, Done, config_file, program, start, write_tiny

from cosmoflow_dali import train
from cosmoflow_dali.config import resolve
from cosmoflow_dali.training.trainer import Trainer
from pipelines.dataset.open import open_folder
from pipelines.errors import DataError
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from preprocess import convert, verify
from preprocess.simulate import SimulateConfig, make_dataset

TRAIN = "cosmoflow_dali.train"
DAMAGED = "universe_0003_000"


def _set_count(path: Path) -> None:
    counts = np.load(path)
    counts[1, 2, 3, 0] = -5
    np.save(path, counts)


def _set_target(path: Path) -> None:
    np.save(path, np.array([0.1, np.nan, 0.2, 0.3], np.float32))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(content)


FAULTS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "counts below zero": ("npy", "_data.npy", _set_count),
    "a NaN target": ("npy", "_label.npy", _set_target),
    "a truncated npy": ("npy", "_data.npy", _truncate),
    "a wrong shape": ("npy", "_data.npy", lambda path: np.save(path, np.zeros((8, 8, 8, 4), np.int16))),
    "a wrong dtype": ("npy", "_data.npy", lambda path: np.save(path, np.zeros((16, 16, 16, 4)))),
    "a pickle": ("npy", "_data.npy", lambda path: np.save(path, np.array([{}], object))),
    "a truncated gzip": ("tfrecord_gzip", ".tfrecord", _truncate),
    "not a gzip": ("tfrecord_gzip", ".tfrecord", lambda path: path.write_bytes(b"x" * 1000)),
    "an empty file": ("tfrecord_gzip", ".tfrecord", lambda path: path.write_bytes(b"")),
    "a wrong CRC": ("tfrecord", ".tfrecord", _flip),
    "a truncated record": ("tfrecord", ".tfrecord", _truncate),
}
SEEN_BY_ALL_RANKS, SEEN_BY_ONE_RANK = "counts below zero", "a truncated gzip"


def refused(data: Path, run: Path, *flags: object, ranks: int = 1, **changes: object) -> Done:
    """Train on `data`; the program exits with an error and no traceback."""
    config = config_file(data.with_suffix(".yaml"), data, **changes)
    done = program(TRAIN, "--config", config, "--run-dir", run, *flags, ranks=ranks)
    assert done.code not in (0, 75)
    assert "Traceback" not in done.err, done.err
    return done


def test_damaged_training_sample_is_named(tmp_path: Path) -> None:
    for name, (format_name, suffix, damage) in FAULTS.items():
        data = write_tiny(tmp_path / name, train=12, validation=4, format_name=format_name)
        damage(data / "train" / f"{DAMAGED}{suffix}")
        ranks = 2 if name in (SEEN_BY_ALL_RANKS, SEEN_BY_ONE_RANK) else 1
        done = refused(data, tmp_path / f"run {name}", ranks=ranks)
        # Each rank may read it, in an epoch in which it is that rank's.
        lines = [line for line in done.err.splitlines() if DAMAGED in line]
        assert 1 <= len(lines) <= ranks, (name, done.err)


def test_damaged_validation_sample_is_named(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=8)
    damaged = sorted((data / "validation").glob("*_data.npy"))[3]
    _set_count(damaged)
    assert damaged.name in refused(data, tmp_path / "run").err


def test_unusable_folders_are_refused_before_a_run_begins(tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = write_tiny(tmp_path / "data", train=3, validation=1)
    line = refused(data, run).err
    assert "3" in line and "4" in line
    assert "3 training samples" in refused(data, run, ranks=2, loader={"batch_size": 2}).err
    if not torch.cuda.is_available():
        assert "device = cuda" in refused(data, run, loader={"batch_size": 1}, device="cuda").err
    # The embedded default's samples are 32 voxels wide. These are not simulated, so they are kept.
    before = sorted(path.name for path in data.rglob("*"))
    done = program(TRAIN, "--data-dir", data, "--batch-size", 2, "--run-dir", run)
    assert done.code == 1 and done.err.startswith("error: model.size = 32: "), done.err
    assert sorted(path.name for path in data.rglob("*")) == before
    shutil.rmtree(data / "validation")
    (data / "validation").mkdir()
    assert str(data / "validation") in refused(data, run).err
    done = refused(tmp_path / "missing", run)
    assert "missing" in done.err and len(done.err.splitlines()) == 1
    assert not run.exists()


def test_crops_that_were_simulated_elsewhere_are_not_periodic(tmp_path: Path) -> None:
    crops, run = SimulateConfig(train=2, validation=1, crops=2), tmp_path / "run"
    make_dataset(crops, tmp_path / "made", workers=1, shown=False)
    arguments = ["-i", str(tmp_path / "made"), "-o", str(tmp_path / "packed"), "--to", "packed"]
    assert convert.main([*arguments, "--workers", "1"]) == 0
    for data in (tmp_path / "made", tmp_path / "packed"):
        line = refused(data, run, model={"size": 32}, symmetries="periodic").err
        assert line.startswith("error: symmetries = periodic: "), line
        assert f"16 samples in {data / 'train'} are crops of 2 universes" in line
    assert not run.exists()


def test_damaged_sample_is_named_by_evaluate_and_predict(tmp_path: Path) -> None:
    weights = DATA / "keras_small.npz"
    for suffix, damage, ranks in (
        ("_data.npy", _set_count, 2),
        ("_data.npy", _truncate, 2),
        ("_label.npy", _set_target, 1),
    ):
        data = write_tiny(tmp_path / damage.__name__, train=4, validation=4, size=32)
        damaged = sorted((data / "validation").glob(f"*{suffix}"))[3]
        damage(damaged)
        evaluate = ("cosmoflow_dali.evaluate", "--data-dir", data, "--weights", weights, "--batch-size", 1)
        files = sorted((data / "validation").glob("*_data.npy"))
        scored = program(*evaluate, ranks=ranks)
        assert scored.code != 0 and scored.out == ""
        predicted = program("cosmoflow_dali.predict", "--weights", weights, *files)
        # A prediction needs no target. Its lines are written as they come: the header and three samples.
        needs = damage is not _set_target
        assert (predicted.code, len(predicted.out.splitlines())) == ((1, 4) if needs else (0, 5))
        for done in (scored, predicted) if needs else (scored,):
            assert done.err.count(damaged.name) == 1, done.err
            assert "Traceback" not in done.err


def test_one_validation_sample_suffices_for_two_ranks(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=1)
    config = config_file(tmp_path / "c.yaml", data, loader={"batch_size": 2}, epochs=1)
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run", ranks=2)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 1


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=1)
    config = config_file(tmp_path / "c.yaml", data)
    arguments = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    limited = (
        "import resource, sys; from cosmoflow_dali.train import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.exit(main({arguments}))"
    )
    process = start([sys.executable, "-c", limited])
    _, err = process.communicate(timeout=60)
    assert process.wait() == 1
    assert "cannot be written (File too large)" in err and "Traceback" not in err


def test_checkpoint_that_rank_0_cannot_write_is_one_line_of_two_ranks(tmp_path: Path) -> None:
    data, run = write_tiny(tmp_path / "data", train=8, validation=1), tmp_path / "run"
    config = config_file(tmp_path / "c.yaml", data, loader={"batch_size": 2}, epochs=1)
    run.mkdir()
    shutil.copy(config, run / "config.yaml")
    (run / "checkpoints").touch()
    done = program(TRAIN, "--config", config, "--run-dir", run, "--resume", ranks=2)
    assert done.code == 1 and done.err.count("error: ") == 1, done.err
    assert f"{run}/checkpoints: cannot be written" in done.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_damaged_samples_are_skipped_counted_and_named(ranks: int, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=16, validation=5)
    bad = [data / "train" / f"{DAMAGED}_data.npy", data / "validation" / "universe_1002_000_label.npy"]
    # A negative count, which the reader does not look for unless it is to skip; and a NaN.
    _set_count(bad[0])
    np.save(bad[1], np.full(4, np.nan, np.float32))
    changes = {"loader": {"batch_size": 4 // ranks, "on_bad_sample": "skip"}, "epochs": 2, "baseline": True}
    config, run_dir = config_file(tmp_path / "c.yaml", data, **changes), tmp_path / "run"
    done = program(TRAIN, "--config", config, "--run-dir", run_dir, ranks=ranks)
    assert done.code == 0, done.err
    skipped = [line for line in done.err.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == 2 and str(bad[0]) in skipped[0] and str(bad[1]) in skipped[1]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["skipped_samples"] == {"train": 1, "validation": 1}
    assert summary["samples"] == 4
    rows = (run_dir / "predictions.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [0, 1, 3, 4]
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    counts = [record["skipped_samples"] for record in records if record["kind"] == "eval"]
    assert counts == [{"train": 1, "validation": 1}] * 2


def test_skipped_sample_is_named_before_the_epoch_ends_and_not_again_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_dir = write_tiny(tmp_path / "data", train=16, validation=1), tmp_path / "run"
    bad = data / "train" / f"{DAMAGED}_data.npy"
    _truncate(bad)
    changes = {"loader": {"batch_size": 4, "on_bad_sample": "skip"}, "epochs": 1}
    config = config_file(tmp_path / "c.yaml", data, **changes)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_end_epoch", interrupt)
        with pytest.raises(SystemExit) as end:
            train.main(["--config", str(config), "--run-dir", str(run_dir)])
    err = capsys.readouterr().err
    assert end.value.code == 130 and "stopped; resume from the last checkpoint" in err
    assert err.count(f"skipped {bad}") == 1
    assert train.main(["--run-dir", str(run_dir), "--resume"]) == 0
    assert f"skipped {bad}" not in capsys.readouterr().err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["skipped_samples"] == {"train": 1, "validation": 0}


def test_many_consecutive_damaged_samples_are_not_skipped(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=20, validation=1)
    for path in sorted((data / "train").glob("*_label.npy"))[1:]:
        np.save(path, np.full(4, np.nan, np.float32))
    done = refused(data, tmp_path / "run", loader={"batch_size": 4, "on_bad_sample": "skip"})
    assert "unusable samples in a row: 16" in done.err and "_label.npy: the target is" in done.err


def _empty(path: Path) -> None:
    np.save(path, np.zeros_like(np.load(path)))


def test_loss_that_a_sample_makes_infinite_is_not_blamed_on_the_learning_rate(tmp_path: Path) -> None:
    def huge_target(path: Path) -> None:
        np.save(path, np.array([0.1, 1e30, 0.2, 0.3], np.float32))

    def one_particle(path: Path) -> None:
        counts = np.zeros_like(np.load(path))
        counts[0, 0, 0, 0] = 9
        np.save(path, counts)

    by_mean = {"batch_size": 1, "apply_log": False}
    cases: list[tuple[str, str, Callable[[Path], None], dict[str, Any], str]] = [
        ("train", "_data.npy", _empty, {"loader": by_mean}, "no particles"),
        ("validation", "_data.npy", _empty, {"loader": by_mean}, "no particles"),
        ("train", "_label.npy", huge_target, {}, "not within -1 to 1"),
    ]
    for number, (split, suffix, damage, changes, reason) in enumerate(cases):
        data = write_tiny(tmp_path / str(number), train=4, validation=4)
        damaged = sorted((data / split).glob(f"*{suffix}"))[2]
        damage(damaged)
        err = refused(data, tmp_path / f"run {number}", **changes).err
        sample = damaged.name.removesuffix(suffix)
        assert sample in err and reason in err and "diverged" not in err, err
    # 16^3 * 4 times the mean, in a half-precision convolution.
    data = write_tiny(tmp_path / "large", train=4, validation=4, size=32)
    for path in (data / "train").glob("*_data.npy"):
        one_particle(path)
    config = resolve({"data": {"dir": str(data)}, "loader": by_mean}).loader
    loader = Loader(
        open_folder(data / "train"), config, rank_slice=RankSlice(0, 1), seed=0, shuffle=False, ragged="drop",
        device=torch.device("cpu"),
    )  # fmt: skip
    loader.raise_if_damaged(np.arange(4))
    with pytest.raises(DataError, match="times the mean"):
        loader.raise_if_damaged(np.arange(4), largest=torch.finfo(torch.float16).max)
    loader.close()


@pytest.mark.parametrize("format_name", ["npy", "packed"])
def test_samples_without_particles_are_skipped_where_they_have_no_mean(
    format_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tiny(tmp_path / "npy", train=8, validation=4)
    for split in ("train", "validation"):
        _empty(sorted((data / split).glob("*_data.npy"))[1])
        for name in ("manifest.jsonl", "files_data.lst", "files_label.lst"):
            (data / split / name).unlink(missing_ok=True)
    assert verify.main([str(data)]) == 0
    assert capsys.readouterr().err.count("holds no particles") == 2
    if format_name != "npy":
        assert convert.main(["-i", str(data), "-o", str(tmp_path / "other"), "--to", format_name]) == 0
        data = tmp_path / "other"
    loader = {"batch_size": 2, "apply_log": False, "on_bad_sample": "skip"}
    config = config_file(tmp_path / "c.yaml", data, loader=loader, epochs=1, baseline=True)
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_samples"] == {"train": 1, "validation": 1} and summary["samples"] == 3
    if format_name == "npy":
        config = config_file(tmp_path / "c.yaml", data, loader={"batch_size": 2}, epochs=1)
        assert program(TRAIN, "--config", config, "--run-dir", tmp_path / "with log").code == 0
