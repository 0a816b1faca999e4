"""Scores and submissions made from MLPerf logs; invalid logs never count."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, Done, config_file, program, write_tiny

from cosmoflow_dali.mlperf.parse_logs import Run
from cosmoflow_dali.mlperf.submission import _add_code
from cosmoflow_dali.results import main

START = 1_695_000_000
SETTINGS: dict[str, Any] = {
    "submission_benchmark": "cosmoflow",
    "submission_org": "Somebody",
    "submission_division": "closed",
    "submission_status": "onprem",
    "submission_platform": "64 boxes [new]",
    "number_of_nodes": 64,
    "accelerators_per_node": 8,
    "train_samples": 524288,
    "eval_samples": 65536,
    "global_batch_size": 512,
    "opt_name": "sgd",
    "opt_base_learning_rate": 0.024,
    "opt_learning_rate_warmup_epochs": 6,
    "opt_learning_rate_warmup_factor": 4.0,
    "opt_learning_rate_decay_boundary_epochs": [20, 22],
    "opt_learning_rate_decay_factor": [0.5, 0.25],
    "dropout": 0.0,
    "opt_weight_decay": 0.02,
}


def log(
    path: Path,
    *,
    seed: int,
    start: float = START,
    seconds: float = 120,
    errors: Sequence[float] = (0.3, 0.2, 0.12),
    training: Sequence[float] = (5.12,),
    after_stop: Sequence[float] = (),
    staging: float | None = None,
    status: str = "success",
    **settings: object,
) -> Path:
    """Write the log of a run that began at `start` and took `seconds` to `path`.

    Args:
        errors: Validation errors of its epochs.
        training: Seconds of training per epoch, cycled.
        after_stop: Errors of the epochs that follow run_stop, which take ten times as long.
        staging: Seconds of staging, which ends 1 s before run_start.
    """
    lines: list[str] = []

    def event(at: float, key: str, value: object = None, **metadata: object) -> None:
        line = {"namespace": "", "time_ms": round(at * 1000), "event_type": "", "key": key, "value": value}
        metadata = {"file": "cosmoflow_dali/train.py", "lineno": 1} | metadata
        lines.append(":::MLLOG " + json.dumps(line | {"metadata": metadata}))

    def epochs(at: float, first: int, errors: Sequence[float], slower: float) -> None:
        for epoch, error in enumerate(errors, first):
            end = at + slower * training[epoch % len(training)]
            for key, moment in (("epoch_start", at), ("eval_start", end), ("eval_stop", end + 0.4)):
                event(moment, key, epoch_num=epoch)
            event(end + 0.4, "eval_error", error, epoch_num=epoch)
            event(end + 0.4, "epoch_stop", epoch_num=epoch)
            at = end + 0.4

    for key in ("cache_clear", "init_start"):
        event(start - 400, key)
    for key, value in {**SETTINGS, "seed": seed, **settings}.items():
        event(start - 399, key, value)
    if staging is not None:
        event(start - 1 - staging, "staging_start")
        event(start - 1, "staging_stop")
    event(start - 1, "init_stop")
    event(start, "run_start")
    epochs(start, 1, errors, 1)
    event(start + seconds, "run_stop", status=status)
    epochs(start + seconds, len(errors) + 1, after_stop, 10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


MINUTES = (2.5, 2.1, 3.9, 2.2, 2.3, 1.0, 2.4, 2.6, 2.7, 2.8)
MIDDLE = 2.45
"""(2.1 + 2.2 + 2.3 + 2.4 + 2.5 + 2.6 + 2.7 + 2.8) / 8: `MINUTES` without 1.0 and 3.9."""


def ten(folder: Path, changes: Mapping[int, dict[str, Any]] | None = None, **settings: object) -> Path:
    """Write the logs of ten consecutive runs of 23 epochs that took `MINUTES`, with `changes` per run."""
    for index, minutes in enumerate(MINUTES):
        options: dict[str, Any] = {
            "seed": index,
            "start": START + 1000 * index,
            "seconds": 60 * minutes,
            "errors": [0.3] * 22 + [0.12],
            **settings,
        }
        log(folder / f"result_{index}.txt", **(options | (changes or {}).get(index, {})))
    return folder


def test_runs_behind_links_count_once_and_hidden_files_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs = tmp_path / "logs"
    log(logs / "1" / "mlperf.log", seed=1)
    log(tmp_path / "scratch" / "2" / "mlperf.log", seed=2, start=START + 1000)
    log(tmp_path / "alone.txt", seed=3, start=START + 2000)
    (logs / "2").symlink_to(tmp_path / "scratch" / "2")
    (logs / "result_3.txt").symlink_to("../alone.txt")
    (logs / "0_latest").symlink_to("1")
    (logs / "1" / "all").symlink_to("..")
    (logs / "1" / "._mlperf.log").write_bytes(b"\0\5\x16\7")
    log(logs / ".Trash-1000" / "mlperf.log", seed=4)
    figures = tmp_path / "figures.json"
    assert main([str(logs), "--json", str(figures)]) == 0
    names = [run["name"] for run in json.loads(figures.read_text())["logs"]]
    assert names == ["1/mlperf.log", "2/mlperf.log", "result_3.txt"]
    assert len(caplog.records) == 2
    # What cannot be searched may hold logs.
    (logs / "5").symlink_to("/nowhere/5")
    with pytest.raises(SystemExit):
        main([str(logs), "--json", str(figures)])
    *_, last = json.loads(figures.read_text())["logs"]
    assert last["name"] == "5" and "cannot be read" in last["faults"][0]


@pytest.fixture
def results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[Done, dict[str, Any]]]:
    """Return a function that runs the program and returns its outcome and, if written, its figures."""

    def run(*arguments: object) -> tuple[Done, dict[str, Any]]:
        figures = tmp_path / "figures.json"
        try:
            code = main([*map(str, arguments), "--json", str(figures)])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            code = stop.code
        output = capsys.readouterr()
        found = json.loads(figures.read_text()) if figures.exists() else {}
        return Done(code, output.out, output.err), found

    return run


Results = Callable[..., tuple[Done, dict[str, Any]]]


def row(done: Done, name: str) -> str:
    """Return the table's row of the log `name`."""
    return next(line for line in done.out.splitlines() if line.startswith(name + " "))


def test_strong_score_is_the_mean_of_the_middle_eight(results: Results, tmp_path: Path) -> None:
    picture = tmp_path / "runs.png"
    done, figures = results(ten(tmp_path / "logs", staging=13), "--plot", picture)
    assert (done.code, done.err) == (0, "")
    (result,) = figures["results"]
    assert result["scaling"] == "strong"
    assert result["time_to_train"] == pytest.approx(MIDDLE)
    assert (result["mean_epochs"], result["mean_staging"]) == (23, pytest.approx(13))
    # 524,288 samples in 5.12 s on 512 accelerators.
    assert result["mean_rate"] == pytest.approx(200)
    assert result["time_to_train_all"] is None and result["models_per_minute"] is None
    assert [run["seed"] for run in figures["logs"]] == list(range(10))
    assert row(done, "result_0.txt").split() == [
        "result_0.txt", "passes", "2.500", "23", "200.0", "13.0", "512", "0", "converged",
    ]  # fmt: skip
    assert "10 of 10" in done.out and " 2.45 " in done.out and "published: NVIDIA v3.0" in done.out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_weak_score_is_models_per_minute_of_ttta(results: Results, tmp_path: Path) -> None:
    # The 11th ends last: it starts 10 s after the first and takes 755 s, so all take 765 s.
    for index in range(59):
        log(
            tmp_path / "logs" / f"result_{index}.txt",
            seed=index,
            start=START + index,
            seconds=755 if index == 10 else 600,
            staging=250 + index,
            training=(73.0,),
            errors=[0.3] * 6 + [0.12],
            number_of_nodes=4,
            global_batch_size=32,
        )
    done, figures = results(tmp_path / "logs", "--plot", tmp_path / "runs.png")
    assert (done.code, done.err) == (0, "")
    (result,) = figures["results"]
    assert (result["scaling"], result["at_once"]) == ("weak", 59)
    assert result["time_to_train_all"] == pytest.approx(12.75)
    assert result["models_per_minute"] == pytest.approx(4.6275, abs=1e-4)
    # The slowest and one of the fastest, which are all equal, are dropped.
    assert result["time_to_train"] == pytest.approx(10)
    assert "59 x 32 = 1888" in done.out and " 4.63" in done.out


def test_folder_named_strong_decides_the_scaling(results: Results, tmp_path: Path) -> None:
    ten(tmp_path / "logs" / "strong", {index: {"start": START + index} for index in range(10)})
    _, figures = results(tmp_path / "logs")
    (result,) = figures["results"]
    assert (result["scaling"], result["at_once"]) == ("strong", 10)
    assert result["time_to_train"] == pytest.approx(MIDDLE) and result["models_per_minute"] is None


def test_events_after_run_stop_are_ignored(results: Results, tmp_path: Path) -> None:
    log(tmp_path / "logs" / "good.log", seed=1, after_stop=[0.11] * 5)
    log(tmp_path / "logs" / "late.log", seed=2, start=START + 1000, errors=[0.3, 0.2], after_stop=[0.12])
    done, figures = results(tmp_path / "logs")
    assert done.code == 1
    good, late = figures["logs"]
    assert (good["counts"], good["epochs"]) == (True, 3)
    assert good["rate"] == pytest.approx(200)
    # The compliance checker itself accepts the later lines.
    assert (late["counts"], late["epochs"], late["complaints"]) == (False, None, [])
    assert late["faults"] == ["did not converge: best error 0.2000, target 0.124"]


def test_slow_start_and_stall_do_not_change_the_rate(results: Results, tmp_path: Path) -> None:
    log(tmp_path / "logs" / "a.log", seed=1, errors=[0.3] * 6 + [0.1], training=[5.12] * 5 + [75.0, 7.0])
    _, figures = results(tmp_path / "logs")
    assert figures["logs"][0]["rate"] == pytest.approx(200)


def test_launcher_prefixes_and_other_lines_are_ignored(results: Results, tmp_path: Path) -> None:
    plain = log(tmp_path / "plain.log", seed=1)
    text = "".join(f"12: {line}\n12: step 7, loss 0.3\n" for line in plain.read_text().splitlines())
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slurm-17.out").write_text("starting\n" + text)
    (tmp_path / "logs" / "notes.txt").write_text("no log at all\n")
    done, figures = results(tmp_path / "logs")
    assert done.code == 0, done.err
    assert [(run["name"], run["minutes"]) for run in figures["logs"]] == [("slurm-17.out", 2)]


def cut(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:40])


def twice(path: Path) -> None:
    path.write_text(2 * path.read_text())


def reworded(old: str, new: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


INVALID: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (cut, "truncated: has no run_stop"),
    "empty": (lambda path: path.write_text(""), "contains no complete MLPerf line"),
    "garbage": (lambda path: path.write_bytes(bytes(range(256)) * 9), "contains no complete MLPerf line"),
    "half a line": (lambda path: path.write_text(":::MLLOG {"), "contains no complete MLPerf line"),
    "no event": (lambda path: path.write_text(":::MLLOG 5\n"), "contains a line that is not an event"),
    "odd key": (reworded('"seed"', '["seed"]'), "contains a line that is not an event"),
    "odd value": (reworded("0.12,", '"low",'), "did not converge"),
    "no number": (reworded("0.12,", "NaN,"), "did not converge"),
    "aborted": (reworded('"success"', '"aborted"'), "ended with status aborted"),
    "two runs": (twice, "contains 2 runs or ranks"),
    "other benchmark": (reworded('"cosmoflow"', '"deepcam"'), "benchmark is deepcam, not cosmoflow"),
    "unnamed benchmark": (reworded("submission_benchmark", "benchmark"), "does not name its benchmark"),
    "not started": (reworded('"run_start"', '"began"'), "has no run_start"),
    "backwards": (
        reworded(str((START + 1120) * 1000), str(START * 1000)),
        "run_stop is not later than run_start",
    ),
    "no time": (reworded(f'"time_ms": {(START + 1120) * 1000}', '"time_ms": NaN'), "has no run_stop"),
    "not compliant": (reworded('"sgd"', '"adam"'), "not compliant"),
}


def test_each_invalid_log_is_named_and_does_not_count(results: Results, tmp_path: Path) -> None:
    log(tmp_path / "logs" / "good" / "mlperf.log", seed=1)
    for number, (damage, _) in enumerate(INVALID.values()):
        damage(log(tmp_path / "logs" / f"bad{number:02}" / "mlperf.log", seed=2 + number, start=START + 1000))
    done, figures = results(tmp_path / "logs")
    assert done.code == 1
    count = len(INVALID)
    assert done.err == f"error: {count} of {count + 1} logs are invalid: bad00/mlperf.log; see the table\n"
    for number, (name, (_, reason)) in enumerate(INVALID.items()):
        assert reason in row(done, f"bad{number:02}/mlperf.log"), name
    assert row(done, "good/mlperf.log").endswith("converged")
    assert [run["name"] for run in figures["logs"] if run["counts"]] == ["good/mlperf.log"]
    assert sum(result["at_once"] for result in figures["results"]) == 1


def test_compliance_errors_are_printed(results: Results, tmp_path: Path) -> None:
    log(tmp_path / "logs" / "result_0.txt", seed=1, opt_name="adam")
    done, _ = results(tmp_path / "logs")
    assert done.code == 1
    assert row(done, "result_0.txt").split()[1] == "fails"
    (printed,) = (line for line in done.out.splitlines() if "fails compliance" in line)
    assert "'opt_name'" in printed and "failed test:  v['value'] in ['sgd', 'SGD'] " in printed


def test_copied_log_counts_once(results: Results, tmp_path: Path) -> None:
    original = log(tmp_path / "logs" / "result_0.txt", seed=1, after_stop=[0.11])
    shorter = original.read_text().splitlines()[:-1]
    (tmp_path / "logs" / "result_1.txt").write_text("".join(f"0: {line}\n" for line in shorter))
    done, figures = results(tmp_path / "logs")
    assert done.code == 1
    assert row(done, "result_1.txt").endswith("the same run as result_0.txt")
    assert [result["runs"] for result in figures["results"]] == [["result_0.txt"]]


def test_one_failed_run_counts_as_slowest_and_two_leave_no_score(results: Results, tmp_path: Path) -> None:
    for failed, middle in (([0], (MIDDLE * 8 - 2.5 + 3.9) / 8), ([0, 3], None)):
        folder = tmp_path / f"{len(failed)} failed"
        ten(folder, {index: {"errors": [0.3]} for index in failed})
        done, figures = results(folder)
        assert done.code == 1
        (result,) = figures["results"]
        assert result["time_to_train"] == (middle and pytest.approx(middle))
        assert f"{10 - len(failed)} valid runs; a submission has 10" in done.out


def test_user_errors_are_one_line(results: Results, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((tmp_path / "empty",), "contains no MLPerf log"),
        ((tmp_path / "missing",), "is not a folder"),
        ((tmp_path, "--plots"), "unrecognized arguments"),
        ((), "required: LOGDIR"),
    ):
        done, _ = results(*arguments)
        assert done.code == 1 and done.out == ""
        assert done.err.startswith("error: ") and done.err.count("\n") == 1 and words in done.err


def test_log_of_this_trainer_is_valid(results: Results, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=4)
    # Targets so small that the untrained network meets the benchmark's quality target.
    for label in data.glob("*/*_label.npy"):
        np.save(label, np.load(label) * np.float32(0.01))
    config = config_file(tmp_path / "c.yaml", data, target_mae=0.124, epochs=9)
    trained = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "runs" / "one")
    assert trained.code == 0, trained.err
    done, figures = results(tmp_path / "runs")
    assert done.code == 0, done.out + done.err
    (run,) = figures["logs"]
    summary = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert (run["name"], run["seed"], run["epochs"]) == ("one/mlperf.log", 5, summary["epochs"])
    assert run["system"]["accelerators_per_node"] == 1 and run["rate"] > 0
    assert (ROOT / run["source"]).is_file()


@pytest.fixture
def submission(results: Results, tmp_path: Path) -> Callable[..., tuple[Done, Path]]:
    """Return a function that writes a submission of a folder of logs; it returns outcome and folder."""

    def run(logs: Path) -> tuple[Done, Path]:
        folder = tmp_path / "submission [1]"
        done, _ = results(logs, "--submission", folder)
        return done, folder

    return run


Submit = Callable[[Path], tuple[Done, Path]]


def test_submission_passes_the_official_checkers(submission: Submit, tmp_path: Path) -> None:
    done, folder = submission(ten(tmp_path / "logs"))
    assert (done.code, done.err) == (0, ""), done.out
    place = "results/64_boxes_new/strong/cosmoflow"
    for verdict in (
        "package checker, .: passes",
        f"seed checker, {place}: passes",
        f"reference-convergence checker, {place}: passes",
    ):
        assert verdict in done.out
    written = sorted(path.name for path in (folder / place).glob("*.txt"))
    assert written == [f"result_{index}.txt" for index in range(10)]
    assert (folder / place / "result_3.txt").read_text() == (tmp_path / "logs" / "result_3.txt").read_text()
    system = json.loads((folder / "systems" / "64_boxes_new.json").read_text())
    filled = {key: value for key, value in system.items() if value}
    assert filled == {
        "submitter": "Somebody",
        "division": "closed",
        "status": "onprem",
        "system_name": "64_boxes_new",
        "number_of_nodes": "64",
        "accelerators_per_node": "8",
    }
    assert len(system) > 30
    assert all(field in done.out for field, value in system.items() if not value)
    code = folder / "benchmarks" / "cosmoflow" / "implementations" / "cosmoflow-dali"
    assert (code / "cosmoflow_dali" / "train.py").is_file() and (code / "pyproject.toml").is_file()
    again, _ = submission(tmp_path / "logs")
    assert again.code == 1 and "is not empty" in again.err


def test_failing_checkers_are_reported(submission: Submit, tmp_path: Path) -> None:
    fast = [0.3] * 19 + [0.12]
    logs = ten(tmp_path / "logs", {9: {"seed": 8}}, errors=fast)
    done, _ = submission(logs)
    assert done.code == 1 and "3 checkers fail" in done.err
    assert "result_8.txt and result_9.txt share seed 8" in done.out
    for words in ("package checker, .: fails", "logs seed 8", "these runs took 20.0000"):
        assert words in done.out


def test_open_submission_is_not_checked_for_convergence(submission: Submit, tmp_path: Path) -> None:
    done, _ = submission(ten(tmp_path / "logs", submission_division="open", errors=[0.12]))
    assert done.code == 0, done.out + done.err
    assert "reference convergence is checked in the closed division only" in done.out


@pytest.mark.parametrize("field", ["submission_org", "submission_division", "global_batch_size"])
def test_logs_of_two_submissions_are_refused(field: str, submission: Submit, tmp_path: Path) -> None:
    other = {"submission_org": "Else", "submission_division": "open", "global_batch_size": 64}[field]
    settings: dict[str, Any] = {field: other}
    log(tmp_path / "logs" / "a.log", seed=1)
    log(tmp_path / "logs" / "b.log", seed=2, start=START + 1000, **settings)
    done, folder = submission(tmp_path / "logs")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "at a time" in done.err
    assert not folder.exists()


def test_runs_of_another_program_come_without_code(submission: Submit, tmp_path: Path) -> None:
    logs = ten(tmp_path / "logs")
    for path in logs.iterdir():
        path.write_text(path.read_text().replace("cosmoflow_dali/train.py", "/opt/main.py"))
    done, folder = submission(logs)
    assert done.code == 0, done.out + done.err
    assert "another program wrote these logs" in done.out
    assert list((folder / "benchmarks" / "cosmoflow" / "implementations").iterdir()) == []


@pytest.mark.parametrize(
    ("year", "ruleset", "rules"),
    [(2020, None, None), (2021, "1.0", "1.0"), (2022, "2.0", "2.0"), (2023, "3.0", "")],
)
def test_logs_are_checked_by_the_rules_of_their_round(
    year: int, ruleset: str | None, rules: str | None, results: Results, tmp_path: Path
) -> None:
    start = datetime(year, 9, 1, tzinfo=timezone.utc).timestamp()
    log(tmp_path / "logs" / "result_0.txt", seed=1, start=start, staging=13)
    done, figures = results(tmp_path / "logs")
    (run,) = figures["logs"]
    assert run["ruleset"] == ruleset
    if rules is None:
        assert not run["counts"] and "v0.7" in run["faults"][0] and run["complaints"] == []
        assert row(done, "result_0.txt").split()[1:3] == ["no", "rules"]
    # Until v3.0 staging was part of the timed run.
    elif rules:
        assert row(done, "result_0.txt").split()[1:3] == ["fails", rules]
        assert any("staging_start" in complaint for complaint in run["complaints"])
    else:
        assert done.code == 0 and row(done, "result_0.txt").split()[1] == "passes"


def test_flag_chooses_the_rules_and_a_submission_has_one_round(results: Results, tmp_path: Path) -> None:
    start = datetime(2020, 9, 1, tzinfo=timezone.utc).timestamp()
    log(tmp_path / "logs" / "result_0.txt", seed=1, start=start)
    done, figures = results(tmp_path / "logs", "--ruleset", "1.0")
    assert done.code == 0 and figures["logs"][0]["ruleset"] == "1.0"
    done, _ = results(tmp_path / "logs", "--submission", tmp_path / "no rules")
    assert done.code == 1 and "v0.7" in done.err
    log(tmp_path / "logs" / "result_1.txt", seed=2, start=start + 2 * 365 * 86400)
    log(tmp_path / "logs" / "result_2.txt", seed=3, start=start + 3 * 365 * 86400)
    done, _ = results(tmp_path / "logs", "--submission", tmp_path / "mixed")
    assert done.code == 1 and "2.0 and 3.0" in done.err and not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_log_is_not_overwritten_by_the_figures(flag: str, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "result_0.txt"
    log.parent.mkdir()
    log.write_text("no MLPerf line\n")
    (tmp_path / "link").symlink_to(log)
    for output in (log, tmp_path / "link"):
        done = program("cosmoflow_dali.results", tmp_path / "logs", flag, output)
        assert done.code == 1 and done.err.startswith(f"error: {output}: is the input {log} itself")
        assert log.read_text() == "no MLPerf line\n"


def test_code_is_added_on_a_file_system_without_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", refuse)
    _add_code(tmp_path, [Run(tmp_path / "log", "log", source="cosmoflow_dali/train.py")])
    code = tmp_path / "benchmarks" / "cosmoflow" / "implementations" / "cosmoflow-dali"
    for name in ("cosmoflow_dali/train.py", "pipelines/formats/packed/gather.c", "run.sub"):
        assert (code / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(code.rglob("__pycache__"))
