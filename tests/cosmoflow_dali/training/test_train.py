"""Runs of the trainer: the files they write, and that stopping and resuming changes nothing."""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Forked
from helpers import OPEN, ROOT, Done, Ranks, command, config_file, environment, program, start, write_tiny
from helpers import run as run_command
from rank_programs import HEAD
from run_artifacts import metrics, same_weights

from cosmoflow_dali import __version__
from cosmoflow_dali.config import read_yaml, resolve
from cosmoflow_dali.training.run_dir import resume_run
from pipelines.errors import ConfigError

TRAIN = "cosmoflow_dali.train"
PRECISIONS = [pytest.param(name, marks=pytest.mark.slow) for name in ("bf16", "fp16")]

RUNS: dict[str, dict[str, Any]] = {
    "reference": {},
    "open": OPEN,
    "bf16": {"compute": {"precision": "bf16"}},
    "fp16": {"compute": {"precision": "fp16", "micro_batch": 2}},
}
"""Changes of the configuration, by name of the run."""

OPTIMIZERS = {"reference": "SGD", "open": "Adam", "bf16": "SGD", "fp16": "SGD"}


def mlperf_events(run: Path) -> list[dict[str, Any]]:
    lines = (run / "mlperf.log").read_text().splitlines()
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def mlperf_keys(run: Path) -> list[str]:
    return [event["key"] for event in mlperf_events(run)]


def check_compliance(run: Path) -> Done:
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "hpc"]
    line = [*checker, "--ruleset", "3.0.0", str(run / "mlperf.log")]
    # The checker writes a log into its working directory.
    process = Forked(line, cwd=run.parent, env=environment())
    out, err = process.communicate(timeout=60)
    return Done(process.wait(), out, err)


def train(*arguments: object, ranks: int = 1) -> Done:
    """Train to the end."""
    done = program(TRAIN, *arguments, ranks=ranks)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def whole_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run of `RUNS` that was never stopped."""

    @functools.cache
    def folder_of(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        config = config_file(folder / "config.yaml", tiny, **RUNS[name])
        train("--config", config, "--run-dir", folder / "run")
        return folder / "run"

    return folder_of


@pytest.mark.parametrize("name", ["reference", "open", *PRECISIONS])
def test_files_of_a_run(name: str, whole_run: Callable[[str], Path]) -> None:
    run = whole_run(name)
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "mlperf.log", "checkpoints", "predictions.csv", "summary.json",
        "report.html", ".lock",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["samples"] == 7
    assert (summary["steps"], summary["epochs"], summary["global_batch"]) == (24, 4, 4)
    evals = [line for line in metrics(run) if line["kind"] == "eval"]
    assert [line["epoch"] for line in evals] == [0, 1, 2, 3]
    assert evals[-1]["mae"] == summary["mae"]
    assert set(summary["mae_per_parameter"]) == {"Omega_m", "sigma_8", "n_s", "H_0"}
    assert 0 <= summary["data_wait_fraction"]["mean"] <= 1
    assert summary["versions"]["cosmoflow-dali"] == __version__
    precision = name if name in ("bf16", "fp16") else "fp32"
    assert summary["computes"] == f"torch fused {OPTIMIZERS[name]}, eager engine, {precision} on cpu"


def test_mlperf_log_lacks_only_the_quality(whole_run: Callable[[str], Path]) -> None:
    done = check_compliance(whole_run("reference"))
    failures = [line for line in (done.out + done.err).splitlines() if "ailed" in line or "Required" in line]
    assert failures and all("eval_error" in line for line in failures), done.err


def test_run_that_reaches_its_target_stops_and_complies(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=4)
    # Targets so small that the untrained network's output has the benchmark's quality.
    for label in data.glob("*/*_label.npy"):
        np.save(label, np.load(label) * np.float32(0.01))
    config = config_file(tmp_path / "c.yaml", data, target_mae=0.124, epochs=9)
    train("--config", config, "--run-dir", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["outcome"] == "reached"
    assert summary["mae"] <= 0.124
    assert summary["epochs"] < 9
    checked = check_compliance(tmp_path / "run")
    assert checked.code == 0 and "SUCCESS" in checked.out + checked.err, checked.err


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_staged_run_has_the_same_losses(ranks: int, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=9, validation=3, format_name="tfrecord_gzip")
    start_ms = round(1e3 * time.time()) - 60_000
    flags = {
        "plain": [],
        "staged": ["--set", f"data.stage.dir={tmp_path}/disk", "--set", "submission.org=us"],
    }
    flags["again"] = [*flags["staged"], "--caches-cleared", "--staged-since", str(start_ms)]
    losses = []
    for name, more in flags.items():
        loader = {"batch_size": 4 // ranks}
        config = config_file(tmp_path / "c.yaml", data, loader=loader, epochs=2, global_batch=4)
        done = train("--config", config, "--run-dir", tmp_path / name, *more, ranks=ranks)
        losses.append([line["loss"] for line in metrics(tmp_path / name) if line["kind"] == "step"])
        if name != "plain":
            staged = 0 if name == "again" else 9
            assert f"staged {staged} of 9 samples on 1 nodes" in done.err
    assert losses[0] == losses[1] == losses[2]

    keys = mlperf_keys(tmp_path / "staged")
    order = ("init_start", "staging_start", "staging_stop", "init_stop", "run_start")
    assert sorted(order, key=keys.index) == list(order)
    stop = mlperf_events(tmp_path / "staged")[keys.index("staging_stop")]["metadata"]
    size = sum(path.stat().st_size for path in data.glob("*/*.tfrecord"))
    assert (stop["samples"], stop["read_bytes"]) == (12, size) and stop["staging_duration"] > 0
    checked = check_compliance(tmp_path / "staged")
    failures = [line for line in (checked.out + checked.err).splitlines() if "ailed" in line]
    assert all("eval_error" in line for line in failures), checked.err
    assert "staging" in json.loads((tmp_path / "staged" / "summary.json").read_text())["seconds"]

    # What a launcher did before the program started is logged.
    events = {event["key"]: event for event in mlperf_events(tmp_path / "again")}
    assert events["cache_clear"]["value"] is True and events["submission_org"]["value"] == "us"
    assert events["staging_start"]["time_ms"] == start_ms
    assert 60 < events["staging_stop"]["metadata"]["staging_duration"] < 300


def resume_to_the_end(run: Path, config: Path, whole: Path) -> None:
    """Resume a stopped run, and compare its files with those of a run that was never stopped."""
    train("--config", config, "--run-dir", run, "--resume")
    assert same_weights(run, whole)
    assert metrics(run) == metrics(whole)
    assert mlperf_keys(run) == mlperf_keys(whole)


def wait_for_checkpoint(run: Path, samples: int) -> None:
    """Return once `run` has a checkpoint of its first epoch after `samples` samples."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any((run / "checkpoints").glob(f"*sample{samples:09d}.pt")):
            return
        time.sleep(0.01)
    raise TimeoutError(f"no checkpoint of sample {samples} in {run}")


@pytest.mark.parametrize("name", ["open", pytest.param("reference", marks=pytest.mark.slow), *PRECISIONS])
def test_resume_after_kill_9_is_exact(
    name: str, tiny: Path, tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    config = config_file(tmp_path / "config.yaml", tiny, **RUNS[name])
    run = tmp_path / "run"
    process = start(command(TRAIN, ["--config", config, "--run-dir", run]))
    wait_for_checkpoint(run, 8)
    process.kill()
    process.wait()
    resume_to_the_end(run, config, whole_run(name))


def newest_epoch(run: Path) -> int:
    """Return the epoch in the name of the newest checkpoint of `run`; -1 if there is none."""
    names = (path.name for path in (run / "checkpoints").glob("epoch*.pt"))
    return max((int(name[5:10]) for name in names), default=-1)


@pytest.mark.slow
def test_resume_after_three_random_kills_is_exact(tiny: Path, tmp_path: Path) -> None:
    rng = random.Random(11)
    config = config_file(tmp_path / "config.yaml", tiny, epochs=40, log={"every": 1, "checkpoint_every": 5})
    whole, run = tmp_path / "whole", tmp_path / "run"
    train("--config", config, "--run-dir", whole)
    line = command(TRAIN, ["--config", config, "--run-dir", run, "--resume"])
    # At any moment: between steps, in them, in an evaluation, in a write.
    for epoch in sorted(rng.sample(range(38), 3)):
        process = start(line)
        deadline = time.monotonic() + 120
        while newest_epoch(run) < epoch and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05))
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    resume_to_the_end(run, config, whole)


def test_resume_after_sigterm_or_with_a_damaged_checkpoint_is_exact(
    tiny: Path, tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    config, run, whole = config_file(tmp_path / "config.yaml", tiny), tmp_path / "run", whole_run("reference")
    process = start(command(TRAIN, ["--config", config, "--run-dir", run]))
    wait_for_checkpoint(run, 8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "--resume" in err
    resume_to_the_end(run, config, whole)

    newest = max((run / "checkpoints").iterdir())
    content = bytearray(newest.read_bytes())
    # More bytes than the padding between two tensors, which is not read.
    middle = len(content) // 2
    content[middle : middle + 256] = bytes(byte ^ 1 for byte in content[middle : middle + 256])
    newest.write_bytes(content)
    done = train("--run-dir", run, "--resume")
    assert newest.name in done.err and "falling back" in done.err
    assert same_weights(run, whole)


def test_sigusr1_under_mpirun_saves_and_exits_with_75(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "config.yaml", tiny, loader={"batch_size": 2}, epochs=2)
    run = tmp_path / "run"
    line = command(TRAIN, ["--config", config, "--run-dir", run], ranks=2)
    process = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(run, 8)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert err.count("--resume") == 1
    train("--run-dir", run, "--resume", ranks=2)
    assert [line["epoch"] for line in metrics(run) if line["kind"] == "eval"] == [0, 1]


def test_two_ranks_have_the_losses_of_one(
    tiny: Path, tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    config = config_file(tmp_path / "c.yaml", tiny, loader={"batch_size": 2})
    train("--config", config, "--run-dir", tmp_path / "run", ranks=2)
    one, two = metrics(whole_run("reference")), metrics(tmp_path / "run")
    for key, count in (("loss", 12), ("mae", 4)):
        values = [line[key] for line in two if key in line]
        assert len(values) == count
        assert values == pytest.approx([line[key] for line in one if key in line], abs=1e-5)


KERNELS = (
    HEAD
    + """
from types import SimpleNamespace
from torch.nn.parallel import DistributedDataParallel
from cosmoflow_dali import train
from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.step import forward_backward
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.sample import Batch

gpus, choices = GPUS, CHOICES
torch.cuda.get_device_name = lambda device: gpus[world.rank]
train.check_convolutions = lambda *given: None
train.choose_kernels = lambda *given: choices[world.rank]
config = SimpleNamespace(compute=ComputeConfig(), loader=SimpleNamespace(batch_size=1))
run = SimpleNamespace(config=config, checkpoint=None)
network = ReferenceConfig(size=8, blocks=2, filters=8, dense=(8, 8), dropout=0.0)
with report_errors(world) as session:
    session.connect()
    model = CosmoFlow(network)
    names = train._use_kernels(run, model, session, torch.device("cuda", 0))
    print(world.rank, names, [block.__name__ for block in model.blocks])
    torch.manual_seed(1)
    whole = Batch(torch.rand(2, 4, 8, 8, 8), torch.rand(2, 4), torch.arange(2))
    own = Batch(*(value[world.rank : world.rank + 1] for value in (whole.volume, whole.target, whole.index)))
    forward_backward(DistributedDataParallel(model), own, "fp32")
    alone = CosmoFlow(network)
    forward_backward(alone, whole, "fp32")
    for one, other in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
"""
)
"""Two ranks that choose kernels and take a step, on CPUs that pose as GPUS."""

FUNCTIONS = {"torch": "pool_then_activate", "triton pool": "pool_block"}
"""Functions of the kernels, by name."""


@pytest.mark.parametrize("gpus", [["A100", "A100"], ["A100", "H100"]])
def test_ranks_choose_kernels_for_their_own_model_of_gpu(gpus: list[str]) -> None:
    choices = [["torch", "triton pool"], ["triton pool", "torch"]]
    program = KERNELS.replace("GPUS", repr(gpus)).replace("CHOICES", repr(choices))
    with Ranks([sys.executable, "-c", program], range(2), 2, TRITON_INTERPRET="1") as ranks:
        statuses, words = ranks.end(60)
    assert statuses == {0}, words
    for rank in range(2):
        used = choices[rank if gpus[rank] != gpus[0] else 0]
        assert f"{rank} {choices[0]} {[FUNCTIONS[name] for name in used]}" in words


def test_kernel_that_is_missing_on_one_rank_ends_all() -> None:
    choices = [["torch", "torch"], ["torch", "none"]]
    program = KERNELS.replace("GPUS", "['A100', 'H100']").replace("CHOICES", repr(choices))
    with Ranks([sys.executable, "-c", program], range(2), 2, TRITON_INTERPRET="1") as ranks:
        statuses, words = ranks.end(60)
    assert statuses == {1} and words.count("compute.kernels") == 1, words


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one_with_the_open_network(tiny: Path, tmp_path: Path) -> None:
    # Adam would turn rounding errors of a small gradient into a full step. With SGD at this rate, rounding
    # errors do not grow from step to step.
    changes: dict[str, Any] = OPEN | {"log": {"every": 1}, "optimizer": {"kind": "sgd"}}
    changes["schedule"] = {"kind": "one_cycle", "peak_lr": 0.003}
    losses = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        config = config_file(tmp_path / "c.yaml", tiny, **changes | {"loader": {"batch_size": 4 // ranks}})
        train("--config", config, "--run-dir", folder, ranks=ranks)
        lines = metrics(folder)
        losses.append([line["loss"] for line in lines if line["kind"] == "step"])
        losses[-1] += [line["mae"] for line in lines if line["kind"] == "eval"]
    assert len(losses[0]) == 24 + 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.slow
def test_instances_side_by_side_equal_separate_runs(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "config.yaml", tiny, loader={"batch_size": 2}, epochs=2)
    both = tmp_path / "both"
    # The ranks of an instance find each other by a launcher's variables.
    line = command(TRAIN, ["--config", config, "--run-dir", both, "--instances", 2], ranks=4)
    done = run_command(line)
    assert done.code == 0, done.err
    for instance in range(2):
        separate = tmp_path / f"separate{instance}"
        train("--config", config, "--run-dir", separate, "--seed", 5 + instance, ranks=2)
        run = both / str(instance + 1)
        assert metrics(run) == metrics(separate) and same_weights(run, separate)


@pytest.mark.slow
def test_resume_on_three_ranks_is_exact(tmp_path: Path) -> None:
    # With more than two ranks, the order in which gradients are summed affects their last bits.
    data = write_tiny(tmp_path / "data", train=12, validation=4)
    config = config_file(tmp_path / "config.yaml", data, loader={"batch_size": 1})
    whole, run = tmp_path / "whole", tmp_path / "run"
    train("--config", config, "--run-dir", whole, ranks=3)
    train("--config", config, "--run-dir", run, "--epochs", 2, ranks=3)
    train("--config", config, "--run-dir", run, "--resume", ranks=3)
    assert metrics(run) == metrics(whole) and same_weights(run, whole)


def test_invalid_arguments_are_one_line(tiny: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "config.yaml", tiny)
    for flags, key in (
        (["--set", "loader.thread=2"], "loader.thread = 2"),
        (["--instances", "2"], "--instances = 2"),
        (["--set", "data.stage.dir=$NO_SUCH/x"], "data.stage.dir = $NO_SUCH/x"),
        (["--set", "global_batch=8"], "global_batch = 8"),
    ):
        done = program(TRAIN, "--config", config, "--run-dir", tmp_path / str(len(key)), *flags)
        assert done.code == 1
        errors = [line for line in done.err.splitlines() if "error: " in line]
        assert len(errors) == 1 and errors[0].startswith(f"error: {key}: "), done.err


def test_resume_keeps_the_global_batch_and_what_affects_the_weights(
    tiny: Path, tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    config = config_file(tmp_path / "c.yaml", tiny, epochs=1)
    run = tmp_path / "run"
    train("--config", config, "--run-dir", run)
    done = program(TRAIN, "--config", config, "--run-dir", run)
    assert done.code == 1 and str(run) in done.err and "--resume" in done.err
    for settings, key in (
        ({"schedule.base_lr": 0.5}, "schedule.base_lr"),
        ({"seed": 6}, "seed"),
        ({"shuffle": False}, "shuffle"),
        ({"loader.apply_log": False}, "loader.apply_log"),
        ({"loader.batch_size": 2}, "loader.batch_size"),
    ):
        with pytest.raises(ConfigError) as refusal:
            resume_run(run, resolve(read_yaml(config), settings), ranks=1)
        assert refusal.value.key == key
    again = ("--config", config, "--epochs", 2, "--run-dir", run, "--resume")
    refused = program(TRAIN, *again, "--seed", 6)
    assert refused.code == 1 and refused.err.startswith("error: seed = 6: ")
    train(*again, "--batch-size", 2, ranks=2)
    assert [line["epoch"] for line in metrics(run) if line["kind"] == "eval"] == [0, 1]


def test_resume_refuses_other_samples_and_another_order(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=2, format_name="tfrecord")
    config, run = config_file(tmp_path / "c.yaml", data), tmp_path / "run"
    train("--config", config, "--run-dir", run, "--epochs", 1)

    def exchanged(root: Path, split: str) -> None:
        first, *_, last = sorted((root / split).glob("*.tfrecord"))
        contents = first.read_bytes(), last.read_bytes()
        last.write_bytes(contents[0])
        first.write_bytes(contents[1])

    def renamed(root: Path, split: str) -> None:
        min((root / split).glob("*.tfrecord")).rename(root / split / "zzz.tfrecord")

    for number, (change, split) in enumerate(
        ((renamed, "train"), (exchanged, "train"), (exchanged, "validation"))
    ):
        other = shutil.copytree(data, tmp_path / str(number))
        change(other, split)
        refused = program(TRAIN, "--run-dir", run, "--config", config, "--resume", "--data-dir", other)
        assert refused.code == 1 and f"error: data.dir = {other}: its {split} samples" in refused.err
    # The same samples in another folder and format.
    assert program("preprocess.convert", "-i", data, "-o", tmp_path / "packed", "--to", "packed").code == 0
    moved = ("--data-dir", tmp_path / "packed", "--set", "loader.on_bad_sample=skip")
    train("--run-dir", run, "--config", config, "--epochs", 2, "--resume", *moved)
