"""Log files and console output of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cosmoflow_dali.training.logs import Progress, RunLogs, configure_logging
from pipelines.distributed.world import World


def lines(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_logs_are_truncated_to_the_checkpoint(tmp_path: Path) -> None:
    with RunLogs(tmp_path) as logs:
        logs.metric({"step": 1})
        logs.mlperf.event("run_start")
        at_checkpoint = logs.lengths()
        logs.metric({"step": 2})
        logs.mlperf.event("run_stop")
    with RunLogs(tmp_path, at_checkpoint) as logs:
        logs.metric({"step": 2})
    assert lines(tmp_path) == [1, 2]
    events = (tmp_path / "mlperf.log").read_text().splitlines()
    assert [json.loads(event.removeprefix(":::MLLOG "))["key"] for event in events] == ["run_start"]


def test_logs_start_empty_without_a_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        with RunLogs(tmp_path) as logs:
            logs.metric({"step": step})
    assert lines(tmp_path) == [2]


def test_logs_without_a_folder_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLogs(None) as logs:
        logs.metric({"step": 1})
        logs.mlperf.event("run_start")
        assert logs.lengths() == {}
    assert list(tmp_path.iterdir()) == []


def test_progress_without_a_terminal_is_a_line_every_15_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(world: World) -> str:
        configure_logging(world)
        progress = Progress()
        with progress.epoch("epoch 1/1", 0, 60):
            for second in range(60):
                monkeypatch.setattr("time.monotonic", lambda second=second: 100.0 + second)
                progress.advance(1, "a line")
        return capsys.readouterr().err

    assert show(World()) == "a line\n" * 4
    assert show(World(rank=1, size=2)) == ""


def test_messages_of_other_ranks_are_warnings_with_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("cosmoflow_dali.training")
    for world in (World(), World(rank=1, size=2)):
        configure_logging(world)
        logger.info("a message")
        logger.warning("a warning")
    assert capsys.readouterr().err == "a message\na warning\nrank 1: a warning\n"
