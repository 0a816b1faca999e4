"""The trainer as a user starts it: what a run leaves behind, and that stopping changes nothing."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import OPEN, ROOT, Done, command, config_file, environment, program, start, write_tiny
from left_behind import metrics, same_weights

from cosmoflow_dali import __version__

TRAIN = "cosmoflow_dali.train"


def mlperf_keys(run: Path) -> list[str]:
    lines = (run / "mlperf.log").read_text().splitlines()
    return [json.loads(line.removeprefix(":::MLLOG "))["key"] for line in lines]


def compliance(run: Path) -> Done:
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "hpc"]
    line = [*checker, "--ruleset", "3.0.0", str(run / "mlperf.log")]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=run.parent)
    return Done(done.returncode, done.stdout, done.stderr)


RUNS: dict[str, dict[str, Any]] = {
    "reference": {},
    "open": OPEN,
    "bf16": {"compute": {"precision": "bf16"}},
    "fp16": {"compute": {"precision": "fp16", "micro_batch": 2}},
}
"""Runs by what they change."""


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of `RUNS`, finished, and the configuration beside it."""
    runs = {}
    for name, changes in RUNS.items():
        folder = tmp_path_factory.mktemp(name)
        config = config_file(folder / "config.yaml", tiny, **changes)
        done = program(TRAIN, "--config", config, "--run-dir", folder / "run")
        assert done.code == 0, done.err
        runs[name] = folder / "run"
    return runs


def test_a_run_leaves_what_it_should(undisturbed: dict[str, Path]) -> None:
    for run in undisturbed.values():
        names = {path.name for path in run.iterdir()}
        assert names == {
            "config.yaml", "metrics.jsonl", "mlperf.log", "checkpoints", "predictions.csv", "summary.json",
            "report.html",
        }  # fmt: skip
        summary = json.loads((run / "summary.json").read_text())
        assert summary["samples"] == 7
        assert (summary["steps"], summary["epochs"], summary["global_batch"]) == (24, 4, 4)
        evals = [line for line in metrics(run) if line["kind"] == "eval"]
        assert [line["epoch"] for line in evals] == [0, 1, 2, 3]
        assert evals[-1]["mae"] == summary["mae"]
        assert set(summary["mae_per_parameter"]) == {"Omega_m", "sigma_8", "n_s", "H_0"}
        assert 0 <= summary["data_wait_fraction"]["mean"] <= 1
    computes = {
        name: json.loads((run / "summary.json").read_text())["computes"] for name, run in undisturbed.items()
    }
    assert computes == {
        "reference": "torch fused SGD, eager engine, fp32 on cpu",
        "open": "torch fused Adam, eager engine, fp32 on cpu",
        "bf16": "torch fused SGD, eager engine, bf16 on cpu",
        "fp16": "torch fused SGD, eager engine, fp16 on cpu",
    }


def test_the_mlperf_log_lacks_only_the_quality(undisturbed: dict[str, Path]) -> None:
    done = compliance(undisturbed["reference"])
    failures = [line for line in (done.out + done.err).splitlines() if "ailed" in line or "Required" in line]
    assert failures and all("eval_error" in line for line in failures), done.err


def test_a_run_that_reaches_its_target_ends_there_and_complies(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=4)
    # Targets so small that the untrained network's answer is within the benchmark's quality.
    import numpy as np

    for label in data.glob("*/*_label.npy"):
        np.save(label, np.load(label) * np.float32(0.01))
    config = config_file(tmp_path / "c.yaml", data, target_mae=0.124, epochs=9)
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["outcome"] == "reached"
    assert summary["versions"]["cosmoflow-dali"] == __version__
    assert summary["mae"] <= 0.124
    assert summary["epochs"] < 9
    checked = compliance(tmp_path / "run")
    assert checked.code == 0 and "SUCCESS" in checked.out + checked.err, checked.err


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_staged_run_is_the_same_run(ranks: int, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=9, validation=3, format_name="tfrecord_gzip")
    losses = []
    for name in ("plain", "staged", "again"):
        stage = {"stage": {"dir": str(tmp_path / "disk")}} if name != "plain" else {}
        changes = {"data": {"dir": str(data)} | stage, "loader": {"batch_size": 4 // ranks}, "epochs": 2}
        config = config_file(tmp_path / "c.yaml", data, **changes)
        done = program(TRAIN, "--config", config, "--run-dir", tmp_path / name, ranks=ranks)
        assert done.code == 0, done.err
        losses.append([line["loss"] for line in metrics(tmp_path / name) if line["kind"] == "step"])
        if name != "plain":
            staged = 0 if name == "again" else 9
            assert f"staged {staged} of 9 samples on 1 nodes" in done.err
    assert losses[0] == losses[1] == losses[2]
    log = (tmp_path / "staged" / "mlperf.log").read_text().splitlines()
    keys = [json.loads(line.removeprefix(":::MLLOG "))["key"] for line in log]
    order = [
        keys.index(key) for key in ("init_start", "staging_start", "staging_stop", "init_stop", "run_start")
    ]
    assert order == sorted(order)
    stop = json.loads(log[keys.index("staging_stop")].removeprefix(":::MLLOG "))["metadata"]
    size = sum(path.stat().st_size for path in data.glob("*/*.tfrecord"))
    assert (stop["samples"], stop["read_bytes"]) == (12, size) and stop["staging_duration"] > 0
    checked = compliance(tmp_path / "staged")
    failures = [line for line in (checked.out + checked.err).splitlines() if "ailed" in line]
    assert all("eval_error" in line for line in failures), checked.err
    assert "staging" in json.loads((tmp_path / "staged" / "summary.json").read_text())["seconds"]


def resume_to_the_end(run: Path, config: Path, undisturbed: Path) -> None:
    """Resume a run that was stopped, and compare what it leaves with one that was not."""
    done = program(TRAIN, "--config", config, "--run-dir", run, "--resume")
    assert done.code == 0, done.err
    assert same_weights(run, undisturbed)
    assert metrics(run) == metrics(undisturbed)
    assert mlperf_keys(run) == mlperf_keys(undisturbed)


def wait_for_step(run: Path, step: int) -> None:
    """Return once a checkpoint of `run` has at least `step` samples or an epoch behind it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any((run / "checkpoints").glob(f"*sample{step:09d}.pt")):
            return
        time.sleep(0.01)
    raise TimeoutError(f"no checkpoint of sample {step} in {run}")


@pytest.mark.parametrize(
    "name", ["reference", "open", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bf16", "fp16"))]
)
def test_kill_9_mid_epoch_and_resume_change_nothing(
    name: str, tiny: Path, tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    config = config_file(tmp_path / "config.yaml", tiny, **RUNS[name])
    run = tmp_path / "run"
    line = command(TRAIN, ["--config", config, "--run-dir", run])
    process = start(line)
    wait_for_step(run, 8)
    process.kill()
    process.wait()
    resume_to_the_end(run, config, undisturbed[name])


def newest_epoch(run: Path) -> int:
    """The epoch of the newest checkpoint of `run`, which its name tells; -1 without one."""
    names = (path.name for path in (run / "checkpoints").glob("epoch*.pt"))
    return max((int(name[5:10]) for name in names), default=-1)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    rng = random.Random(11)
    config = config_file(tmp_path / "config.yaml", tiny, epochs=60, log={"every": 1, "checkpoint_every": 5})
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert program(TRAIN, "--config", config, "--run-dir", whole).code == 0
    line = command(TRAIN, ["--config", config, "--run-dir", run, "--resume"])
    # Any moment of an epoch: between steps, in them, in an evaluation, in a write.
    for epoch in sorted(rng.sample(range(58), 10)):
        process = start(line)
        deadline = time.monotonic() + 120
        while newest_epoch(run) < epoch and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05))
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    resume_to_the_end(run, config, whole)


def test_sigterm_saves_and_leaves_with_75(tiny: Path, tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    config = config_file(tmp_path / "config.yaml", tiny)
    run = tmp_path / "run"
    line = command(TRAIN, ["--config", config, "--run-dir", run])
    process = start(line)
    wait_for_step(run, 8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "--resume" in err
    resume_to_the_end(run, config, undisturbed["reference"])


def test_under_mpirun_sigusr1_saves_and_leaves_with_75(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "config.yaml", tiny, loader={"batch_size": 2})
    run = tmp_path / "run"
    line = command(TRAIN, ["--config", config, "--run-dir", run], ranks=2)
    process = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 8)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.count("--resume") == 1
    done = program(TRAIN, "--run-dir", run, "--resume", ranks=2)
    assert done.code == 0, done.err
    assert [line["epoch"] for line in metrics(run) if line["kind"] == "eval"] == [0, 1, 2, 3]


def test_a_damaged_newest_checkpoint_falls_back(
    tiny: Path, tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    config = config_file(tmp_path / "config.yaml", tiny)
    run = tmp_path / "run"
    assert program(TRAIN, "--config", config, "--run-dir", run).code == 0
    newest = max((run / "checkpoints").iterdir())
    content = bytearray(newest.read_bytes())
    # More than the padding between two tensors, which nobody reads.
    middle = len(content) // 2
    content[middle : middle + 256] = bytes(byte ^ 1 for byte in content[middle : middle + 256])
    newest.write_bytes(content)
    # A process of its own, where a warning is printed.
    process = start(command(TRAIN, ["--run-dir", run, "--resume"]))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert newest.name in err and "falling back" in err
    assert same_weights(run, undisturbed["reference"])


@pytest.mark.parametrize("network", ["reference", pytest.param("open", marks=pytest.mark.slow)])
def test_two_ranks_give_the_losses_of_one(network: str, tiny: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"log": {"every": 1}, "epochs": 4}
    if network == "open":
        # Adam makes a whole step of a gradient that is nothing but rounding; SGD shows the sums as they are,
        # at a rate at which rounding does not grow from step to step.
        changes = OPEN | changes | {"optimizer": {"kind": "sgd"}}
        changes["schedule"] = {"kind": "one_cycle", "peak_lr": 0.003}
    losses = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        config = config_file(folder / "c.yaml", tiny, **changes | {"loader": {"batch_size": 4 // ranks}})
        done = program(TRAIN, "--config", config, "--run-dir", folder / "run", ranks=ranks)
        assert done.code == 0, done.err
        lines = metrics(folder / "run")
        losses.append([line["loss"] for line in lines if line["kind"] == "step"])
        losses[-1] += [line["mae"] for line in lines if line["kind"] == "eval"]
    assert len(losses[0]) == 24 + 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_models_side_by_side_are_the_runs_that_they_are_alone(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "config.yaml", tiny, loader={"batch_size": 2}, epochs=2)
    both = tmp_path / "both"
    done = program(TRAIN, "--config", config, "--run-dir", both, "--instances", 2, ranks=4)
    assert done.code == 0, done.err
    for model in range(2):
        lone = tmp_path / f"lone{model}"
        done = program(TRAIN, "--config", config, "--run-dir", lone, "--seed", 5 + model, ranks=2)
        assert done.code == 0, done.err
        run = both / str(model + 1)
        assert metrics(run) == metrics(lone) and same_weights(run, lone)


@pytest.mark.slow
def test_three_ranks_resume_to_the_same_bits(tmp_path: Path) -> None:
    # With more than two, the order in which gradients are summed decides their last bits.
    data = write_tiny(tmp_path / "data", train=12, validation=4)
    config = config_file(tmp_path / "config.yaml", data, loader={"batch_size": 1})
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert program(TRAIN, "--config", config, "--run-dir", whole, ranks=3).code == 0
    assert program(TRAIN, "--config", config, "--run-dir", run, "--epochs", 2, ranks=3).code == 0
    done = program(TRAIN, "--config", config, "--run-dir", run, "--resume", ranks=3)
    assert done.code == 0, done.err
    assert metrics(run) == metrics(whole) and same_weights(run, whole)


def test_a_global_batch_that_is_named_is_kept_or_the_run_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "config.yaml", tiny, global_batch=8)
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run")
    assert (
        done.code == 1
        and "global_batch" in done.err
        and "1 ranks with loader.batch_size 4 make 4" in done.err
    )
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run", "--batch-size", 8, "--epochs", 1)
    assert done.code == 0, done.err


def test_what_the_launch_tells_reaches_the_log(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=4, validation=2, format_name="tfrecord")
    config = config_file(tmp_path / "config.yaml", data, epochs=1)
    flags = ["--set", f"data.stage.dir={tmp_path}/node", "--set", "submission.org=us", "--caches-cleared"]
    began = round(1e3 * time.time()) - 60_000
    line = ["--config", config, "--run-dir", tmp_path / "run", *flags, "--staged-since", began]
    done = program(TRAIN, *line)
    assert done.code == 0, done.err
    lines = (tmp_path / "run" / "mlperf.log").read_text().splitlines()
    events = {event["key"]: event for event in (json.loads(one.removeprefix(":::MLLOG ")) for one in lines)}
    assert events["cache_clear"]["value"] is True and events["submission_org"]["value"] == "us"
    assert events["staging_start"]["time_ms"] == began
    assert 60 < events["staging_stop"]["metadata"]["staging_duration"] < 300


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--set", "loader.threads"], "expected KEY=VALUE"),
        (["--set", "loader.thread=2"], "did you mean threads"),
        (["--set", "loader={"], "--set"),
        (["--staged-since", "5"], "nothing is staged"),
        (["--instances", "2"], "--run-dir"),
        (["--instances", "2", "--run-dir", "/tmp/none"], "does not divide 1 ranks evenly"),
        (["--set", "data.stage.dir=$NONE_SUCH/x"], "not set"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    flags: list[str], said: str, tiny: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path / "config.yaml", tiny)
    where = [] if "--run-dir" in flags or "--instances" in flags else ["--run-dir", str(tmp_path / "run")]
    done = program(TRAIN, "--config", config, *where, *flags)
    assert done.code == 1 and done.err.count("error: ") == 1 and said in done.err, done.err


def test_resume_on_other_ranks_keeps_the_global_batch_or_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", tiny, epochs=1)
    run = tmp_path / "run"
    assert program(TRAIN, "--config", config, "--run-dir", run).code == 0
    again = ("--config", config, "--epochs", 2, "--run-dir", run, "--resume")
    refused = program(TRAIN, *again, ranks=2)
    assert refused.code != 0 and "global batch of 4" in refused.err
    done = program(TRAIN, *again, "--batch-size", 2, ranks=2)
    assert done.code == 0, done.err
    assert [line["epoch"] for line in metrics(run) if line["kind"] == "eval"] == [0, 1]


def test_what_would_change_the_weights_is_refused_on_resume(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", tiny, epochs=1)
    run = tmp_path / "run"
    assert program(TRAIN, "--config", config, "--run-dir", run).code == 0
    for flags, key in (
        (["--base-lr", 0.5], "base_lr"),
        (["--seed", 6], "seed"),
        (["--no-shuffle"], "shuffle"),
    ):
        done = program(TRAIN, "--config", config, "--run-dir", run, "--resume", *flags)
        assert done.code == 1
        assert key in done.err and "Traceback" not in done.err
    done = program(TRAIN, "--config", config, "--run-dir", run)
    assert done.code == 1 and "--resume" in done.err
