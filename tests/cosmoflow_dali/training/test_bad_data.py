"""Bad samples in the trainer: one line that names the file, on one rank and on two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, command, config_file, program, run, write_tiny

from cosmoflow_dali import train
from cosmoflow_dali.training.trainer import Trainer

CULPRIT = "universe_0003_000"


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
    "a wrong shape": (
        "npy",
        "_data.npy",
        lambda path: np.save(path, np.zeros((8, 8, 8, 4), np.int16)),
    ),
    "a wrong dtype": ("npy", "_data.npy", lambda path: np.save(path, np.zeros((16, 16, 16, 4)))),
    "a pickle": ("npy", "_data.npy", lambda path: np.save(path, np.array([{}], object))),
    "a truncated gzip": ("tfrecord_gzip", ".tfrecord", _truncate),
    "a gzip that is not": (
        "tfrecord_gzip",
        ".tfrecord",
        lambda path: path.write_bytes(b"x" * 1000),
    ),
    "an empty file": ("tfrecord_gzip", ".tfrecord", lambda path: path.write_bytes(b"")),
    "a wrong CRC": ("tfrecord", ".tfrecord", _flip),
    "a truncated record": ("tfrecord", ".tfrecord", _truncate),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_training_sample_is_named(name: str, tmp_path: Path) -> None:
    format_name, suffix, spoil = FAULTS[name]
    data = write_tiny(tmp_path / "data", train=12, validation=4, format_name=format_name)
    spoil(data / "train" / f"{CULPRIT}{suffix}")
    config = config_file(tmp_path / "c.yaml", data)
    ranks = 2 if name in ("counts below zero", "a truncated gzip") else 1
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run", ranks=ranks)
    assert done.code not in (0, 75)
    assert CULPRIT in done.err, done.err
    assert "Traceback" not in done.err
    # Both ranks may come upon it, reading ahead into epochs in which it is theirs.
    assert 1 <= len([line for line in done.err.splitlines() if CULPRIT in line]) <= ranks


def test_a_bad_validation_sample_is_named(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=8)
    spoiled = sorted((data / "validation").glob("*_data.npy"))[3]
    _set_count(spoiled)
    config = config_file(tmp_path / "c.yaml", data)
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 1
    assert spoiled.name in done.err and "Traceback" not in done.err


def test_folders_that_cannot_be_trained_on(tmp_path: Path) -> None:
    def refused(data: Path, *flags: object) -> str:
        config = config_file(tmp_path / "c.yaml", data)
        run = tmp_path / "run"
        done = program("cosmoflow_dali.train", "--config", config, "--run-dir", run, *flags)
        assert done.code == 1, done.err
        assert "Traceback" not in done.err and len(done.err.splitlines()) == 1, done.err
        assert not run.exists()
        return done.err

    assert "missing" in refused(tmp_path / "missing")
    data = write_tiny(tmp_path / "data", train=3, validation=1)
    line = refused(data)
    assert "3" in line and "4" in line
    shutil.rmtree(data / "validation")
    (data / "validation").mkdir()
    assert str(data / "validation") in refused(data)


@pytest.mark.parametrize(
    ("format_name", "suffix", "spoil"),
    [("npy", "_data.npy", _set_count), ("npy", "_data.npy", _truncate), ("npy", "_label.npy", _set_target)],
)
def test_a_bad_sample_is_named_by_evaluate_and_predict(
    format_name: str, suffix: str, spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", train=4, validation=4, format_name=format_name, size=32)
    spoiled = sorted((data / "validation").glob(f"*{suffix}"))[3]
    spoil(spoiled)
    weights = ROOT / "tests" / "data" / "keras_small.npz"
    scored = program(
        "cosmoflow_dali.evaluate", "--data-dir", data, "--weights", weights, "--batch-size", 1, ranks=2
    )
    files = sorted((data / "validation").glob("*_data.npy"))
    predicted = program("cosmoflow_dali.predict", "--weights", weights, *files)
    for done in (scored, predicted):
        assert done.code != 0 and done.out == ""
        assert done.err.count(spoiled.name) == 1, done.err
        assert "Traceback" not in done.err


def test_fewer_samples_than_ranks_and_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=2, validation=1)
    config = config_file(tmp_path / "c.yaml", data, loader={"batch_size": 1})
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run", ranks=3)
    assert done.code != 0 and "2 training samples do not fill one step of 3" in done.err
    config = config_file(tmp_path / "c.yaml", data, device="cuda")
    if not torch.cuda.is_available():
        done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run")
        assert done.code == 1 and "device = 'cuda'" in done.err
    assert not (tmp_path / "run").exists()


def test_one_validation_sample_is_enough_for_two_ranks(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=1)
    config = config_file(tmp_path / "c.yaml", data, loader={"batch_size": 2}, epochs=1)
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run", ranks=2)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 1


def test_samples_that_are_there_are_never_simulated_over(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=4, validation=1, size=16)
    before = sorted(path.name for path in data.rglob("*"))
    # The embedded default's samples are 32 voxels wide; these are somebody's own.
    done = program(
        "cosmoflow_dali.train", "--data-dir", data, "--batch-size", 2, "--run-dir", tmp_path / "run"
    )
    assert done.code == 1
    assert "model.size = 32" in done.err and "16 voxels" in done.err
    assert sorted(path.name for path in data.rglob("*")) == before


def test_a_disk_that_is_full_is_one_line(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=1)
    config = config_file(tmp_path / "c.yaml", data)
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash"]
    line = command("cosmoflow_dali.train", ["--config", config, "--run-dir", tmp_path / "run"])
    done = run([*limited, *line])
    assert done.code == 1
    assert "cannot be written (File too large)" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_samples_are_skipped_counted_and_named_where_that_is_asked_for(
    ranks: int, tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", train=16, validation=5)
    bad = [data / "train" / f"{CULPRIT}_data.npy", data / "validation" / "universe_1002_000_label.npy"]
    # A count below zero, which the reader leaves to the pipeline unless asked to skip; and no number.
    counts = np.load(bad[0])
    counts[0, 0, 0, 0] = -1
    np.save(bad[0], counts)
    np.save(bad[1], np.full(4, np.nan, np.float32))
    changes = {"loader": {"batch_size": 4 // ranks, "on_bad_sample": "skip"}, "epochs": 2, "baseline": True}
    config, run_dir = config_file(tmp_path / "c.yaml", data, **changes), tmp_path / "run"
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", run_dir, ranks=ranks)
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if line.startswith("skipped ")]
    assert len(said) == 2 and str(bad[0]) in said[0] and str(bad[1]) in said[1]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["skipped_samples"] == {"train": 1, "validation": 1}
    assert summary["samples"] == 4
    rows = (run_dir / "predictions.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [0, 1, 3, 4]
    evaluations = [
        record
        for record in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "eval"
    ]
    assert [record["skipped_samples"] for record in evaluations] == [{"train": 1, "validation": 1}] * 2


def test_a_skipped_sample_is_told_of_before_the_epoch_ends_and_remembered_by_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_dir = write_tiny(tmp_path / "data", train=16, validation=1), tmp_path / "run"
    bad = data / "train" / f"{CULPRIT}_data.npy"
    _truncate(bad)
    changes = {"loader": {"batch_size": 4, "on_bad_sample": "skip"}, "epochs": 1}
    config = config_file(tmp_path / "c.yaml", data, **changes)

    def die(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_end_epoch", die)
        with pytest.raises(SystemExit) as end:
            train.main(["--config", str(config), "--run-dir", str(run_dir)])
    told = capsys.readouterr().err
    assert end.value.code == 130 and "stopped; resume from the last checkpoint" in told
    assert told.count(f"skipped {bad}") == 1
    assert train.main(["--run-dir", str(run_dir), "--resume"]) == 0
    assert f"skipped {bad}" not in capsys.readouterr().err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["skipped_samples"] == {"train": 1, "validation": 0}


def test_a_folder_of_bad_samples_is_not_skipped(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=20, validation=1)
    for path in sorted((data / "train").glob("*_label.npy"))[1:]:
        np.save(path, np.full(4, np.nan, np.float32))
    changes = {"loader": {"batch_size": 4, "on_bad_sample": "skip"}}
    config = config_file(tmp_path / "c.yaml", data, **changes)
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 1
    assert "this sample and the next 15 are damaged" in done.err and "Traceback" not in done.err
