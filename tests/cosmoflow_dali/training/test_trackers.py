"""Copies of a run's records in TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.metadata
import json
import struct
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import config_file, program

from cosmoflow_dali.config import resolve
from cosmoflow_dali.reporting import summary
from cosmoflow_dali.training import trackers
from cosmoflow_dali.training.logs import RunLogs
from cosmoflow_dali.training.trackers import check_installed
from pipelines.errors import ConfigError
from pipelines.settings import flatten_tree

TRAIN = "cosmoflow_dali.train"

Curves = dict[str, list[tuple[int, float]]]
"""Points (step, value) of each curve, in their order."""


def curves(run: Path) -> Curves:
    """The curves that metrics.jsonl holds."""
    found: Curves = defaultdict(list)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kind, step, _ = record.pop("kind"), record.pop("step"), record.pop("time_ms")
        for name, value in flatten_tree(record).items():
            found[f"{kind}/{name}"].append((step, value))
    return found


def shown_by_tensorboard(run: Path) -> tuple[Curves, list[float]]:
    """The curves of single precision that TensorBoard reads, without the summary; the times of the losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}, purge_orphaned_data=False).Reload()
    tags = events.Tags()["scalars"]
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    times = [event.wall_time for event in events.Scalars("step/loss")]
    assert found["summary/mae"][0] == found["eval/mae"][-1] and len(found["summary/mae"]) == 1
    return {tag: points for tag, points in found.items() if not tag.startswith("summary/")}, times


def records_of_wandb(file: Path) -> list[Any]:
    """The records in a file of W&B's, which is a log of LevelDB behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, records = file.read_bytes(), 7, b"", []
    while at < len(content):
        if (left := -at % 32768) and left < 7:
            at += left
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        # Records of one part, and the last parts of others.
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def kept_by_wandb(run: Path) -> tuple[Curves, str, dict[str, Any]]:
    """The curves of the newest offline run, without the summary, its id, and its summary."""
    file = max((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    found: Curves = defaultdict(list)
    final: dict[str, Any] = {}
    name = ""
    for record in records_of_wandb(file):
        name = record.run.run_id or name
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for tag, value in row.items():
            if not tag.startswith("_") and tag != "step":
                found[tag].append((row["step"], value))
        final |= {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
    return found, name, final


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_write_report", lambda folder: None)


@pytest.mark.usefixtures("no_report")
def test_resumed_run_continues_its_curves(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    config = config_file(tmp_path / "c.yaml", tiny, epochs=1)
    line = ["--config", config, "--run-dir", run, "--set", "log.trackers=[tensorboard, wandb]"]
    assert program(TRAIN, *line).code == 0
    name_before = kept_by_wandb(run)[1]
    # As after a crash: records and points behind the checkpoint.
    max((run / "checkpoints").iterdir()).unlink()
    done = program(TRAIN, *line, "--epochs", 2, "--resume")
    assert done.code == 0 and "failed" not in done.err, done.err
    truth = curves(run)
    assert [step for step, _ in truth["step/loss"]] == [2, 4, 6, 8, 10, 12]
    shown, times = shown_by_tensorboard(run)
    assert shown == {
        tag: [(step, float(np.float32(value))) for step, value in points] for tag, points in truth.items()
    }
    assert times == sorted(times) and times[-1] - times[0] > 0.01
    # What is written offline holds the whole curve, under the same id.
    kept, name, final = kept_by_wandb(run)
    assert kept == truth and name == name_before == (run / "wandb" / "run_id").read_text()
    assert final["summary/mae"] == truth["eval/mae"][-1][1]


class Recording:
    """A tracker that records what it gets."""

    got: list[Any]

    def __init__(self, folder: Path) -> None:
        Recording.got = []

    def log(self, kind: str, step: int, seconds: float | None, values: dict[str, float]) -> None:
        self.got.append((kind, step, values))

    def close(self, *, failed: bool) -> None:
        self.got.append(failed)


@pytest.mark.parametrize("failed", [False, True])
def test_tracker_gets_the_numbers_of_the_records(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recording)
    try:
        with RunLogs(tmp_path, trackers=["wandb"]) as logs:
            logs.metric({"kind": "step", "step": 1, "loss": 0.5, "text": "a", "none": None})
            at_checkpoint = logs.sync()
            logs.metric({"kind": "step", "step": 2, "loss": 0.6})
            logs.summarize({"steps": 2, "mae": {"n_s": 1}, "finished": True, "gpus": []})
            if failed:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    first = ("step", 1, {"step/loss": 0.5})
    last = ("summary", 2, {"summary/steps": 2, "summary/mae.n_s": 1})
    assert Recording.got == [first, ("step", 2, {"step/loss": 0.6}), last, failed]
    with RunLogs(tmp_path, *at_checkpoint, ["wandb"]):
        pass
    assert Recording.got == [first, False]


@pytest.mark.parametrize("fails_in", ["__init__", "log", "close"])
def test_tracker_that_fails_warns_once(
    fails_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nnetwork")

    failing = type("Failing", (Recording,), {fails_in: fail})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", failing)
    with RunLogs(tmp_path, trackers=["wandb"]) as logs:
        for step in range(20):
            logs.metric({"kind": "step", "step": step})
    (message,) = caplog.messages
    assert message.startswith("log.trackers: wandb has failed (RuntimeError: no network) ")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20


def test_tracker_that_hangs_does_not_hold_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    class Hanging(Recording):
        def log(self, *_: object) -> None:
            release.wait()

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Hanging)
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.01)
    with RunLogs(tmp_path, trackers=["tensorboard"]) as logs:
        logs.metric({"kind": "step", "step": 1})
    release.set()
    assert [message.partition(" after")[0] for message in caplog.messages] == [
        "log.trackers: tensorboard is not done"
    ]


def test_account_that_is_missing_is_no_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with RunLogs(tmp_path, trackers=["wandb"]):
        pass
    assert "(UserError: not logged in; `wandb login`, or set WANDB_MODE=offline)" in caplog.text


@pytest.mark.usefixtures("no_report")
def test_package_that_is_missing_is_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        return installed("not-there" if name == "wandb" else name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    check_installed(["tensorboard"])
    config = config_file(tmp_path / "c.yaml", tiny, log={"trackers": ["tensorboard", "wandb"]})
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 1 and not (tmp_path / "run").exists()
    text = "log.trackers = wandb: wandb is not installed; `pip install wandb`, or leave it out"
    assert done.err == f"error: {text}\n"


@pytest.mark.parametrize("value", [["wandb", "wandb"], ["mlflow"], "wandb"])
def test_trackers_that_are_unknown_or_twice_are_refused(value: object) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({"log": {"trackers": value}})
    assert error.value.key == "log.trackers"
