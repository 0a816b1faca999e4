"""Logs that read as one run's, and a console that suits where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosmoflow_dali.training.logs import Console, RunLogs


def lines(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_came_after_the_checkpoint_is_cut_off(tmp_path: Path) -> None:
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


def test_without_a_checkpoint_the_logs_begin_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        with RunLogs(tmp_path) as logs:
            logs.metric({"step": step})
    assert lines(tmp_path) == [2]


def test_a_rank_without_a_folder_writes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLogs(None) as logs:
        logs.metric({"step": 1})
        logs.mlperf.event("run_start")
        assert logs.lengths() == {}
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_terminal_a_line_comes_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(speaks=True)
    console.start_epoch(0, 1, 0, 100)
    for second in range(60):
        console.advance(1, float(second), lambda: "a line")
    console.end_epoch()
    assert 3 <= capsys.readouterr().err.count("a line\n") <= 5
    silent = Console(speaks=False)
    silent.start_epoch(0, 1, 0, 100)
    silent.advance(1, 100.0, lambda: "a line")
    silent.say("another")
    assert capsys.readouterr().err == ""
