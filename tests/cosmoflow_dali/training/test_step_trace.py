"""Traces of some steps of a run."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import config_file, program

from cosmoflow_dali.arguments import parse
from cosmoflow_dali.config import resolve
from cosmoflow_dali.reporting import summary
from cosmoflow_dali.training.checkpoint import Position
from cosmoflow_dali.training.step_trace import StepTrace, check_profile
from pipelines.distributed.world import World
from pipelines.errors import ConfigError


def step_trace(folder: Path, steps: range, rank: int = 0) -> StepTrace:
    run: Any = SimpleNamespace(folder=folder, profile=steps)
    return StepTrace(run, World(rank=rank, size=2))


def names(trace: Path) -> list[str]:
    """The names of the ranges that the program marks, in the order of their beginnings."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(ranges, key=lambda event: event["ts"])]


def test_trace_of_a_run_holds_the_parts_of_the_steps(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "_write_report", lambda folder: None)
    # Six steps an epoch: the first evaluation lies between the steps.
    config = config_file(tmp_path / "c.yaml", tiny, epochs=2)
    run = tmp_path / "run"
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", run, "--profile", "5:8")
    assert done.code == 0, done.err
    (trace,) = run.glob("trace_*")
    assert trace.name == "trace_5-8.json.gz"

    def parts(step: int) -> list[str]:
        return ["data wait", f"step {step}", "forward", "backward", "update"]

    found = [name for name in names(trace) if not name.startswith("Optimizer")]
    assert found == [*parts(5), *parts(6), "data wait", *parts(7), *parts(8)]


def test_steps_of_the_trace_are_those_that_were_asked_for(tmp_path: Path) -> None:
    batches: list[Any] = list(range(6))
    with step_trace(tmp_path, range(3, 5)) as trace:
        assert list(trace.follow(iter(batches), 0)) == batches
        # It is there as soon as its last step is done.
        counts = Counter(names(tmp_path / "trace_3-4.json.gz"))
        assert counts == {"step 3": 1, "step 4": 1, "data wait": 2}
        assert list(trace.follow(iter(batches), 6)) == batches


def test_trace_from_the_first_step_of_an_epoch_leaves_out_what_is_before(tmp_path: Path) -> None:
    batches: list[Any] = list(range(6))
    with step_trace(tmp_path, range(7, 8)) as trace:
        assert list(trace.follow(iter(batches), 0)) == batches
        with torch.profiler.record_function("evaluation"):
            pass
        assert list(trace.follow(iter(batches), 6)) == batches
    assert names(tmp_path / "trace_7-7.json.gz") == ["data wait", "step 7"]


def test_trace_of_training_that_ends_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches: list[Any] = list(range(6))
    with step_trace(tmp_path, range(5, 10)) as trace:
        assert list(trace.follow(iter(batches), 0)) == batches
    assert {"step 5", "step 6"} <= set(names(tmp_path / "trace_5-9.json.gz"))
    caplog.clear()
    with step_trace(tmp_path, range(7, 9)) as trace:
        assert list(trace.follow(iter(batches), 0)) == batches
    assert caplog.messages == ["--profile: training has ended before step 7; there is no trace"]
    assert len(list(tmp_path.iterdir())) == 1


def test_other_ranks_and_runs_without_profile_record_nothing(tmp_path: Path) -> None:
    for steps, rank in ((range(0), 0), (range(1, 3), 1)):
        batches: Any = iter([1, 2, 3])
        with step_trace(tmp_path, steps, rank) as trace:
            # The very iterator: steps cost nothing more.
            assert trace.follow(batches, 0) is batches
    assert not list(tmp_path.iterdir())


def test_trace_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    batches: list[Any] = [1, 2]
    with step_trace(tmp_path / "missing", range(1, 2)) as trace:
        assert list(trace.follow(iter(batches), 0)) == batches
    assert "there is no trace (" in caplog.text and str(tmp_path / "missing") in caplog.text


@pytest.mark.parametrize(
    ("first", "last", "position"),
    [(13, 14, (0, 0)), (12, 13, (0, 0)), (2, 3, (0, 16)), (4, 5, (0, 16)), (6, 9, (1, 0)), (12, 12, (2, 0))],
)
def test_steps_that_never_come_are_refused(first: int, last: int, position: tuple[int, int]) -> None:
    # Two epochs of six steps of four samples, on two ranks.
    config = resolve({"epochs": 2, "loader": {"batch_size": 2}})
    checkpoint, steps = SimpleNamespace(position=Position(*position)), range(first, last + 1)
    run: Any = SimpleNamespace(config=config, train=range(26), profile=steps, checkpoint=checkpoint)
    with pytest.raises(ConfigError) as error:
        check_profile(run, 2)
    assert (error.value.key, error.value.value) == ("--profile", f"{first}:{last}")
    run.profile = range(0)
    check_profile(run, 2)
    run.checkpoint, run.profile = None, range(1, 13)
    check_profile(run, 2)


def test_steps_that_never_come_leave_no_folder(tiny: Path, tmp_path: Path) -> None:
    config, run = config_file(tmp_path / "c.yaml", tiny), tmp_path / "run"
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", run, "--profile", "24:25")
    assert done.code == 1 and not run.exists()
    assert done.err == "error: --profile = '24:25': the steps left are 1 to 24; name some of them\n"


@pytest.mark.parametrize(
    "text", ["5", "5:", ":5", "0:3", "6:5", "a:b", "-1:3", "1:2:3", "", "1:" + "9" * 5000]
)
def test_text_that_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse([f"--profile={text}"])
    assert (error.value.key, error.value.value) == ("--profile", text)
    assert parse(["--profile=20:25"]).profile == range(20, 26)


def test_trace_and_marks_for_nsight_exclude_each_other() -> None:
    with pytest.raises(ConfigError) as error:
        parse(["--profile", "1:2", "--set", "compute.nvtx=true"])
    assert error.value.key == "--profile"
