"""The check for GPUs: what runs on a Python that has torch and little else, and what is said of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Part

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

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def bare(program: str) -> subprocess.CompletedProcess[str]:
    """`program` in a Python that has torch, numpy, pytest and Triton, and nothing else of the project's."""
    line = [sys.executable, "-c", BARE + program]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)


def test_the_compute_benchmark_takes_its_steps_on_a_bare_python() -> None:
    flags = ["--size", "16", "--batch-size", "2", "--device", "cpu"]
    done = bare(f"""
import pathlib, torch
from benchmarks import compute_bench, picture, recipes
for recipe in compute_bench.recipes(compute_bench._options({flags}), torch.device("cpu")):
    step, forward, *_ = recipes._prepare(recipe, "reference", 16, torch.device("cpu"))
    step()
    print(recipe.name, forward().shape)
picture.draw({{}}, pathlib.Path("nowhere.png"))
""")
    assert done.returncode == 0, done.stderr
    shape = "torch.Size([2, 4])"
    assert done.stdout.splitlines() == [
        f"plain PyTorch, batch 2 {shape}",
        f"fp32 eager auto, batch 2 {shape}",
        "not drawn: this Python lacks matplotlib",
    ]


def test_its_tests_are_collected_on_a_bare_python() -> None:
    engines, block, *_ = gpu_check.parts(Path("/nowhere"), Path("/nowhere"))
    collected = [[*part.arguments[2:], "--collect-only"] for part in (engines, block)]
    done = bare(f"import pytest\nsys.exit(any([pytest.main(each) for each in {collected}]))")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_losses_and_gradients_are_the_eager_ones" in done.stdout
    assert "float32" in done.stdout and "bfloat16" in done.stdout and "no_number" in done.stdout


def test_what_a_part_lacks_is_named_and_it_is_left_out(tmp_path: Path) -> None:
    part = Part("a part", ("numpy", "no_such_package", "no.such"), ["-c", "1 / 0"], 9)
    found = gpu_check.run(part, tmp_path)
    assert (found.outcome, found.reason) == ("left out", "this Python lacks no_such_package, no.such")


@pytest.mark.parametrize(
    ("program", "outcome", "words"),
    [
        ("print('well')", "passed", "well"),
        ("1 / 0", "failed", "ZeroDivisionError"),
        ("input()", "failed", "EOF"),
    ],
)
def test_what_a_part_says_is_kept(program: str, outcome: str, words: str, tmp_path: Path) -> None:
    found = gpu_check.run(Part("a part", ("numpy",), ["-c", program], 30), tmp_path)
    assert found.outcome == outcome and words in (tmp_path / "a_part.txt").read_text()


def test_a_part_that_hangs_is_stopped(tmp_path: Path) -> None:
    found = gpu_check.run(Part("a part", (), ["-c", "import time; time.sleep(60)"], 1), tmp_path)
    assert found.outcome == "timed out" and found.seconds < 30


def test_all_parts_fit_into_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu_check.parts(Path("/nowhere"), Path("/nowhere"))) <= 480


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_training_is_one_that_the_program_takes(tmp_path: Path) -> None:
    from cosmoflow_dali.config import read_yaml, resolve

    gpu_check.write_config(tmp_path)
    config, _ = resolve(read_yaml(tmp_path / "train.yaml"))
    assert config.data.simulate is not None
    assert config.epochs * config.data.simulate.train // config.loader.batch_size == 200
