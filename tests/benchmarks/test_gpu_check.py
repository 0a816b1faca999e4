"""gpu_check: parts that run with torch and little else, and reasons for the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import wait_until_gone

from benchmarks import gpu_check
from benchmarks.gpu_check import CheckStatus, Part

ROOT = Path(__file__).resolve().parents[2]
LACKING = [
    "apex", "crc32c", "deflate", "h5py", "hypothesis", "lz4", "matplotlib", "mlperf_logging", "mpi4py",
    "nvidia", "scipy", "tqdm", "yaml", "zlib_ng", "zstandard",
]  # fmt: skip

BARE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {LACKING!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def bare(program: str) -> subprocess.CompletedProcess[str]:
    """Run `program` with torch, numpy, pytest and Triton, but no other dependency of the project."""
    line = [sys.executable, "-c", BARE + program]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_bare_python_runs_steps_and_collects_tests() -> None:
    flags = ["--size", "16", "--batch-size", "2", "--device", "cpu"]
    bare_parts = [
        part
        for part in gpu_check.parts(Path("/nowhere"), Path("/nowhere"))
        if part.name.startswith("tests") and {*part.needs} <= {"pytest", "triton"}
    ]
    assert len(bare_parts) == 6
    collected = [[*part.arguments[2:], "--collect-only"] for part in bare_parts]
    done = bare(f"""
import contextlib, pathlib, pytest, torch
from benchmarks import compute_bench, picture, recipes
for recipe in compute_bench.recipes(compute_bench._options({flags}), torch.device("cpu")):
    step, forward, *_ = recipes._prepare(recipe, "reference", 16, torch.device("cpu"), contextlib.ExitStack())
    step()
    print(recipe.name, forward().shape)
picture.draw({{}}, pathlib.Path("nowhere.png"))
sys.exit(any([pytest.main(each) for each in {collected}]))
""")
    assert done.returncode == 0, done.stdout + done.stderr
    shape = "torch.Size([2, 4])"
    assert done.stdout.splitlines()[:3] == [
        f"plain PyTorch, batch 2 {shape}",
        f"fp32 eager auto, batch 2 {shape}",
        "not drawn: matplotlib is not installed",
    ]
    assert "test_graph_has_the_losses_and_gradients_of_eager" in done.stdout
    assert "test_engines_and_precisions_match_keras[cuda-graph-bf16]" in done.stdout
    assert "float32" in done.stdout and "bfloat16" in done.stdout and "test_nan" in done.stdout


def test_part_with_missing_packages_is_left_out(tmp_path: Path) -> None:
    part = Part("a part", ("numpy", "no_such_package", "no.such"), ["-c", "1 / 0"], 9)
    found = gpu_check.run(part, tmp_path, 100)
    assert (found.outcome, found.reason) == ("left out", "missing packages: no_such_package, no.such")


def test_output_of_a_part_is_saved(tmp_path: Path) -> None:
    for program, outcome, text in (
        ("print('well')", "passed", "well"),
        ("1 / 0", "failed", "ZeroDivisionError"),
        ("input()", "failed", "EOF"),
    ):
        found = gpu_check.run(Part("a part", ("numpy",), ["-c", program], 30), tmp_path, 100)
        assert found.outcome == outcome and text in (tmp_path / "a_part.txt").read_text()


def test_hanging_part_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_LEAST", 0)
    for seconds, left in ((1, 100.0), (100, 1.0)):
        part = Part("a part", (), ["-c", "import time; time.sleep(60)"], seconds)
        found = gpu_check.run(part, tmp_path, left)
        assert (found.outcome, found.reason) == ("timed out", "after 1 s") and found.seconds < 30


def test_a_part_that_times_out_can_write_its_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_LEAST", 0)
    child = tmp_path / "child"
    # As pytest ends at Ctrl-C.
    program = f"""
import pathlib, subprocess, time
try:
    pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    time.sleep(60)
except KeyboardInterrupt:
    print("one test failed")
"""
    found = gpu_check.run(Part("a part", (), ["-c", program], 2), tmp_path, 100.0)
    assert found.outcome == "timed out" and found.seconds < 30
    assert (tmp_path / "a_part.txt").read_text() == "one test failed\n"
    wait_until_gone([int(child.read_text())])


def test_all_parts_run_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "_LEAST", 0)
    commands = {"passes": "", "fails": "1 / 0", "hangs": "import time; print('begun'); time.sleep(60)"}
    fake = [Part(name, (), ["-c", command], 30) for name, command in commands.items()]
    fake = [*fake, Part("lacks", ("no_such_package",), [], 9), Part("late", (), ["-c", ""], 30)]
    monkeypatch.setattr(gpu_check, "parts", lambda folder, scratch: fake)
    # The time is over when the third part hangs, before the fifth.
    monkeypatch.setattr(gpu_check, "SECONDS", 4)
    records: list[int] = []
    monkeypatch.setattr(gpu_check, "run", spy(gpu_check.run, records, tmp_path))
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    outcomes = ["passed", "failed", "timed out", "left out", "left out"]
    printed = capsys.readouterr().out
    assert [line.split("  ")[0] for line in printed.splitlines()[:-1]] == [part.name for part in fake]
    (path,) = tmp_path.glob("*/gpu_check.json")
    record = json.loads(path.read_text())
    assert [part["outcome"] for part in record["parts"]] == outcomes and "hardware" in record
    assert "begun" in (path.parent / "hangs.txt").read_text()
    # What was known was written before the next part began.
    assert records == [0, 1, 2, 3, 4]


def spy(run: Callable[..., CheckStatus], records: list[int], output: Path) -> Callable[..., CheckStatus]:
    """Return `run`, before which the number of parts in the record is added to `records`."""

    def spied(*arguments: Any) -> CheckStatus:
        found = [json.loads(path.read_text())["parts"] for path in output.glob("*/gpu_check.json")]
        records.append(len(found[0]) if found else 0)
        return run(*arguments)

    return spied


def test_compiled_cases_come_last() -> None:
    parts = gpu_check.parts(Path("/nowhere"), Path("/nowhere"))
    compiled = [part.arguments[-2] == "compile" for part in parts]
    assert compiled == sorted(compiled) and compiled.count(True) == 2
    for part in parts:
        names = {Path(argument).name for argument in part.arguments}
        if names & {"test_engines.py", "test_keras_parity.py"}:
            assert {"compile", "not compile"} & names


def test_total_time_is_limited_to_eight_minutes(tmp_path: Path) -> None:
    assert gpu_check.SECONDS < 480
    found = gpu_check.run(Part("a part", (), ["-c", "1 / 0"], 100), tmp_path, 3.0)
    assert (found.outcome, found.reason) == ("left out", "the time limit is reached")


def test_all_gpu_tests_are_in_a_part() -> None:
    tests = ROOT / "tests"
    marked = {path for path in tests.rglob("test_*.py") if "mark." + "gpu" in path.read_text()}
    parts = gpu_check.parts(Path("/nowhere"), Path("/nowhere"))
    named = {argument for part in parts for argument in part.arguments}
    assert marked and {str(path) for path in marked} <= named


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "no CUDA GPU" in printed.err and not list(tmp_path.iterdir())
    for part in gpu_check.parts(Path("/nowhere"), Path("/nowhere")):
        assert any(line.startswith(part.name) for line in printed.out.splitlines())


def test_training_configuration_is_valid(tmp_path: Path) -> None:
    from cosmoflow_dali.config import read_yaml, resolve

    gpu_check.write_config(tmp_path)
    config = resolve(read_yaml(tmp_path / "train.yaml"))
    assert config.data.simulate is not None
    assert config.epochs * config.data.simulate.train // config.loader.batch_size == 200
