"""Check the project on a machine with a GPU in eight minutes, without set-up: `make gpu-check`.

Runs the tests marked gpu and those of the kernels, short benchmarks, and 200 steps of training, each in a
separate process, with the packages of this Python; what torch.compile compiles comes last. A part with
missing packages, or without time left, is skipped with a reason. Output and results go to a dated folder in
benchmarks/results as soon as they are there. Without a GPU the parts are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from cosmoflow_dali.reporting import system_info

ROOT = harness.RESULTS.parent.parent

SECONDS = 470
"""Time limit of all parts together."""

_LEAST = 10
"""Minimum time left to start a part."""

_GRACE = 5
"""Seconds in which a part whose time is over may still write what it found, as pytest its failures."""

_READS = ("nvidia.dali", "crc32c", "lz4", "zlib_ng", "zstandard")
"""Packages for reading samples."""

_TRAINS = (*_READS, "yaml", "mlperf_logging", "tqdm")

# The project's pytest settings need plugins that may be missing here.
# With -v each result is written at once.
_PYTEST = ["-m", "pytest", "-v", "-o", "addopts=", "--import-mode=importlib", "-c", os.devnull]
_ON_GPU = ["-m", "gpu"]
"""The tests of the kernels detect the GPU themselves."""


@dataclass(frozen=True, slots=True)
class Part:
    """A command, the packages it needs beside torch and numpy, and its time limit in seconds."""

    name: str
    needs: tuple[str, ...]
    arguments: list[str]
    seconds: int


@dataclass(frozen=True, slots=True)
class CheckStatus:
    """Outcome of a part ("passed", "failed", "timed out" or "left out") and its reason."""

    name: str
    outcome: str
    reason: str
    seconds: float


def parts(folder: Path, scratch: Path) -> list[Part]:
    """Return all parts, the most basic ones first."""
    tests = ROOT / "tests"
    engines, block, pool, parity, step, convolutions = (
        str(tests / "cosmoflow_dali" / name)
        for name in (
            "compute/test_engines.py",
            "models/test_triton_block.py",
            "models/test_triton_pool.py",
            "models/test_keras_parity.py",
            "compute/test_step.py",
            "compute/test_preflight.py",
        )
    )
    data = [
        str(tests / name)
        for name in (
            "pipelines/loading/test_decoders.py",
            "pipelines/loading/test_loader.py",
            "benchmarks/test_inflate_bench.py",
        )
    ]
    pytest = [*_PYTEST, "--rootdir", str(ROOT), "-o", f"pythonpath={ROOT} {tests}"]
    samples = scratch / "samples"
    bench = ["--rounds", "3", "--output", str(folder)]
    kernels = "torch" if missing(("triton",)) else "torch,auto"
    grid = ["--batch-size", "1,8", "--engine", "graph", "--kernels", kernels]
    if not missing(_READS):
        grid += ["--loop", "--data-dir", str(samples)]
    io = ["--formats", "npy,packed", "--samples", "8", "--data-dir", str(samples)]
    inflate = ["--data", str(samples / "8x128" / "packed_v3")]
    train = ["--config", str(scratch / "train.yaml"), "--run-dir", str(folder / "run")]
    eagerly, compiled = [*_ON_GPU, "-k", "not compile"], [*_ON_GPU, "-k", "compile"]
    return [
        Part("tests of convolutions", ("pytest",), [*pytest, convolutions], 40),
        Part("tests of the kernels", ("pytest", "triton"), [*pytest, block, pool], 70),
        Part("tests of the data path", ("pytest", *_READS), [*pytest, *_ON_GPU, *data], 80),
        Part("compute_bench", (), ["benchmarks/compute_bench.py", *grid, *bench], 120),
        Part("io_bench", _READS, ["benchmarks/io_bench.py", *io, *bench], 50),
        Part("inflate_bench", _READS, ["benchmarks/inflate_bench.py", *inflate, *bench], 25),
        Part("200 steps of training", _TRAINS, ["-m", "cosmoflow_dali.train", *train], 60),
        Part("tests of the engines", ("pytest", "triton"), [*pytest, *eagerly, engines], 90),
        Part("tests of parity", ("pytest",), [*pytest, *eagerly, parity], 60),
        Part("tests of steps", ("pytest", *_TRAINS), [*pytest, *eagerly, step], 90),
        Part("tests of compiled engines", ("pytest", "triton"), [*pytest, *compiled, engines], 120),
        Part("tests of compiled parity", ("pytest",), [*pytest, *compiled, parity], 90),
    ]


def missing(needs: Sequence[str]) -> list[str]:
    """Return the packages of `needs` that cannot be imported."""
    return [name for name in needs if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def run(part: Part, folder: Path, left: float) -> CheckStatus:
    """Run `part` with its output in a file in `folder` if enough of `left` seconds remain."""
    if lacks := missing(part.needs):
        return CheckStatus(part.name, "left out", "missing packages: " + ", ".join(lacks), 0.0)
    if left < _LEAST:
        return CheckStatus(part.name, "left out", "the time limit is reached", 0.0)
    limit = min(part.seconds, left)
    start = time.monotonic()
    with (
        open(folder / f"{part.name.replace(' ', '_')}.txt", "wb") as output,
        subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            code = process.wait(limit)
            outcome, reason = ("failed", f"exit status {code}") if code else ("passed", "")
        except subprocess.TimeoutExpired:
            outcome, reason = "timed out", f"after {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        finally:
            # Its own processes would keep memory of the GPU.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return CheckStatus(part.name, outcome, reason, time.monotonic() - start)


def write_config(scratch: Path) -> None:
    """Write the configuration of 200 steps of the reference network on simulated universes."""
    tree = {
        "data": {
            "dir": str(scratch / "data"),
            "simulate": {"train": 200, "validation": 32, "size": 32, "voxel": 4.0, "steps": 4},
        },
        "loader": {"batch_size": 4},
        "model": {"size": 32, "blocks": 4, "filters": 16, "dropout": 0.0},
        "compute": {"precision": "bf16", "engine": "graph"},
        "epochs": 4,
        "shuffle": True,
        "device": "cuda",
    }
    # JSON is YAML.
    (scratch / "train.yaml").write_text(json.dumps(tree))


def _list(parts: Sequence[Part]) -> None:
    """Print the command of each part, or the packages that it lacks."""
    print("with a GPU, these parts would run one after the other:")
    for part in parts:
        lacks = missing(part.needs)
        action = (
            f"left out, missing packages: {', '.join(lacks)}"
            if lacks
            else " ".join(part.arguments).replace(f"{ROOT}/", "")
        )
        print(f"{part.name:28} {part.seconds:4} s  {action}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a part failed or there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS, help="where the dated folder is made")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        _list(parts(Path("RESULTS"), Path("SCRATCH")))
        print("error: torch sees no CUDA GPU here; `make test-all` is what runs without one", file=sys.stderr)
        return 1
    folder = options.output / f"{time.strftime('%Y-%m-%dT%H%M%S')}_gpu_check"
    folder.mkdir(parents=True)
    outcomes, end = [], time.monotonic() + SECONDS
    record: dict[str, object] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": system_info.versions(),
        "hardware": system_info.hardware(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        write_config(Path(scratch))
        for part in parts(folder, Path(scratch)):
            outcomes.append(run(part, folder, end - time.monotonic()))
            last = outcomes[-1]
            print(f"{last.name:28} {last.outcome:9} {last.seconds:5.0f} s  {last.reason}", flush=True)
            record["parts"] = [asdict(outcome) for outcome in outcomes]
            (folder / "gpu_check.json").write_text(json.dumps(record, indent=2) + "\n")
    print("written to", folder)
    return int(any(outcome.outcome in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
