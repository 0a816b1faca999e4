"""Resumes of runs that are over, that lost lines of their logs, or whose disk was full."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Done, config_file, program
from run_artifacts import metrics, same_weights

from cosmoflow_dali.config import read_yaml, resolve
from cosmoflow_dali.mlperf.checkers import check_compliance
from cosmoflow_dali.training.checkpoint import Checkpoint
from cosmoflow_dali.training.run_dir import resume_run
from pipelines.errors import ConfigError

RESULTS = ("predictions.csv", "summary.json", "report.html")


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs, of which the newest checkpoints are two of the third epoch and its end."""
    folder = tmp_path_factory.mktemp("finished")
    config = config_file(folder / "c.yaml", tiny, epochs=3)
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", folder / "run")
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def resume(run: Path, *arguments: object) -> Done:
    return program("cosmoflow_dali.train", "--run-dir", run, "--resume", *arguments)


def test_run_that_is_over_trains_nothing_and_keeps_its_log(run: Path, finished: Path) -> None:
    for name in RESULTS:
        (run / name).unlink()
    done = resume(run)
    assert done.code == 0, done.err
    assert "has done 3 epochs" in done.err
    assert metrics(run) == metrics(finished) and same_weights(run, finished)
    # To the byte, with all times.
    assert (run / "mlperf.log").read_bytes() == (finished / "mlperf.log").read_bytes()
    assert all((run / name).exists() for name in RESULTS)
    assert (run / "predictions.csv").read_bytes() == (finished / "predictions.csv").read_bytes()


def test_target_that_is_reached_ends_the_log_at_its_original_time(run: Path, finished: Path) -> None:
    def stop(folder: Path) -> tuple[int, str]:
        (line,) = (line for line in (folder / "mlperf.log").read_text().splitlines() if "run_stop" in line)
        event = json.loads(line.removeprefix(":::MLLOG "))
        return event["time_ms"], event["metadata"]["status"]

    done = resume(run, "--target-mae", 0.0001)
    assert done.code == 0, done.err
    assert stop(run) == (stop(finished)[0], "aborted")
    done = resume(run, "--target-mae", 9)
    assert done.code == 0, done.err
    assert stop(run) == (stop(finished)[0], "success")
    assert json.loads((run / "summary.json").read_text())["outcome"] == "reached"


def test_target_of_the_epoch_before_does_not_end_an_epoch_in_its_middle(run: Path, finished: Path) -> None:
    newest = max((run / "checkpoints").iterdir())
    newest.unlink()
    position = Checkpoint.load(max((run / "checkpoints").iterdir())).position
    assert (position.epoch, position.samples > 0) == (2, True)
    done = resume(run, "--target-mae", 9)
    assert done.code == 0, done.err
    assert metrics(run) == metrics(finished) and same_weights(run, finished)
    keys = [json.loads(line[9:])["key"] for line in (run / "mlperf.log").read_text().splitlines()]
    assert keys.count("epoch_start") == keys.count("epoch_stop") == 3 and keys.count("run_stop") == 1


@pytest.mark.parametrize("newest", ["the end of epoch 3", "the middle of epoch 3"])
def test_fewer_epochs_than_done_are_refused(newest: str, run: Path) -> None:
    if newest == "the middle of epoch 3":
        max((run / "checkpoints").iterdir()).unlink()
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for epochs in (1, 2):
        with pytest.raises(ConfigError) as refusal:
            resume_run(run, resolve(read_yaml(run / "config.yaml"), {"epochs": epochs}), ranks=1)
        assert (refusal.value.key, refusal.value.value) == ("epochs", epochs)
    done = resume(run, "--epochs", 2)
    assert done.code == 1 and done.err.startswith("error: epochs = 2: the run in ")
    assert done.err.count("\n") == 1
    assert before.items() <= {path: path.read_bytes() for path in run.iterdir() if path.is_file()}.items()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "zero bytes at the end": lambda log: log.write_bytes(log.read_bytes()[:-400] + bytes(400)),
    "zero bytes alone": lambda log: log.write_bytes(bytes(log.stat().st_size)),
    "no log": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_logs_that_a_crash_damaged_end_as_those_of_one_run(
    damage: Callable[[Path], object], run: Path, finished: Path
) -> None:
    for name in ("mlperf.log", "metrics.jsonl"):
        damage(run / name)
    # Some resumes train on, others find the run complete.
    trains = damage is Path.unlink
    done = resume(run, *(("--epochs", 4) if trains else ()))
    assert done.code == 0, done.err
    assert "mlperf.log: lost" in done.err and "metrics.jsonl: lost" in done.err
    log, original = (folder / "mlperf.log" for folder in (run, finished))
    assert log.read_bytes().startswith(original.read_bytes().partition(b":::MLLOG")[0])
    lines = original.read_text().splitlines()
    assert log.read_text().splitlines()[: len(lines) - 1] == lines[:-1]
    assert check_compliance(log, "3.0") == check_compliance(original, "3.0") or trains
    assert b"\0" not in (run / "metrics.jsonl").read_bytes() and (run / "report.html").exists()


def test_disk_that_is_full_at_the_end_is_one_line_and_the_results_are_made_later(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    for name in ("predictions.csv", "report.html"):

        def fails(file: int, name: str = name) -> None:
            if f".{name}." in os.readlink(f"/proc/self/fd/{file}"):
                raise OSError(28, "No space left on device")
            fsync(file)

        monkeypatch.setattr(os, "fsync", fails)
        done = resume(run)
        assert done.code == 1 and "Traceback" not in done.err
        assert f"error: {run / name}: " in done.err and "No space left on device" in done.err
    monkeypatch.undo()
    assert resume(run).code == 0
    assert (run / "predictions.csv").read_bytes() == (finished / "predictions.csv").read_bytes()
