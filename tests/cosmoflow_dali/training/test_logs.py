"""Log files and console output of a run."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
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
        at_checkpoint = logs.sync()
        logs.metric({"step": 2})
        logs.mlperf.event("run_stop")
    with RunLogs(tmp_path, *at_checkpoint) as logs:
        logs.metric({"step": 2})
    assert lines(tmp_path) == [1, 2]
    events = (tmp_path / "mlperf.log").read_text().splitlines()
    assert [json.loads(event.removeprefix(":::MLLOG "))["key"] for event in events] == ["run_start"]


CUTS: dict[str, Callable[[bytes], bytes | None]] = {
    "whole": lambda content: content,
    "last bytes": lambda content: content[:-10],
    "all bytes": lambda _: b"",
    "file": lambda _: None,
    "last bytes are zero": lambda content: content[:-10] + bytes(10),
    "all bytes are zero": lambda content: bytes(len(content)),
    "zero bytes inside": lambda content: content[:20] + bytes(30) + content[50:],
    "bytes of another file inside": lambda content: content[:20] + b"\xff\x80\n7\n{" + content[26:],
    "a line break is lost": lambda content: content.replace(b"\n", b" ", 1),
    "whole, and zero bytes behind": lambda content: content + bytes(512),
}
"""Logs as a crash leaves them."""


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_what_a_crash_took_from_a_log_is_never_zero_bytes(
    cut: Callable[[bytes], bytes | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunLogs(tmp_path) as logs:
        for step in range(5):
            logs.metric({"step": step})
            logs.mlperf.event("epoch_start", metadata={"epoch_num": step})
        saved = logs.sync()
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "mlperf.log")}
    for name, content in whole.items():
        left = cut(content)
        if left is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(left)
    with caplog.at_level("WARNING"), RunLogs(tmp_path, *saved) as logs:
        logs.metric({"step": 5})
    # The checkpoint's copy, with the original times.
    assert (tmp_path / "mlperf.log").read_bytes() == whole["mlperf.log"]
    steps = lines(tmp_path)
    assert steps == sorted({*steps, 5}) and set(steps) <= set(range(6))
    assert [name in caplog.text for name in whole] == [len(steps) < 6] * 2, caplog.text


def test_run_stop_keeps_its_time_for_a_run_that_is_over(tmp_path: Path) -> None:
    with RunLogs(tmp_path) as logs:
        logs.mlperf.event("run_start")
        before = logs.sync()
        logs.mlperf.end("run_stop", time_ms=1234)
        after = logs.sync()
    # A checkpoint of an earlier version was saved before run_stop and has no copy of the log.
    for saved in (after, (before[0], "")):
        content = (tmp_path / "mlperf.log").read_bytes()
        with RunLogs(tmp_path, *saved) as logs:
            assert logs.run_stop_ms == 1234
            assert b"run_stop" not in (tmp_path / "mlperf.log").read_bytes()
            logs.mlperf.end("run_stop", time_ms=logs.run_stop_ms)
        assert (tmp_path / "mlperf.log").read_bytes().count(b"run_stop") == 1
        (tmp_path / "mlperf.log").write_bytes(content)


def test_logs_are_on_the_disk_before_a_checkpoint_remembers_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    with RunLogs(tmp_path) as logs:
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
        logs.sync()
    assert [Path(path).name for path in synced] == ["metrics.jsonl", "mlperf.log"]


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
        assert logs.sync() == ({}, "")
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
