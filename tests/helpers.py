"""Small data sets, and the programs as a user starts them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import yaml
from forked import Forked

from pipelines.dataset.open import open_path
from pipelines.formats.registry import FORMATS
from pipelines.formats.tfrecord import frame
from pipelines.sample import Sample
from pipelines.slab import Slab

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
SIZE = 16


def tiny_sample(index: int, size: int = SIZE) -> Sample:
    """Lognormal Poisson counts whose roughness follows the target's second component."""
    rng = np.random.default_rng(index)
    target = rng.uniform(-1, 1, 4).astype(np.float32)
    field = np.exp((0.8 + 0.4 * target[1]) * rng.standard_normal((size, size, size, 4)))
    return Sample(rng.poisson(field).astype(np.int16), target)


def slab_of(counts: npt.NDArray[Any], slab: Slab) -> npt.NDArray[Any]:
    """The planes of `slab` of `counts` (D, H, W, C)."""
    depth = len(counts) // slab.count
    padded = np.pad(counts, ((1, 1), (0, 0), (0, 0), (0, 0)), "wrap" if slab.periodic else "constant")
    return padded[slab.index * depth :][: depth + 2]


def slabs(*counts: int) -> list[Slab]:
    """All slabs of samples that are cut into `counts` parts, with either kind of ends."""
    return [
        Slab(index, count, periodic)
        for count in counts
        for index in range(count)
        for periodic in (False, True)
    ]


def framed(*record: bytes | memoryview) -> bytes:
    """A TFRecord of `record`, given in pieces."""
    return b"".join(frame([*record]))


def read_sample(path: Path) -> Sample:
    """The only sample in the file `path`, validated."""
    (dataset,) = open_path(path)
    assert len(dataset) == 1
    return dataset.read(0)


def write_tiny(
    root: Path, *, train: int, validation: int, test: int = 0, format_name: str = "npy", size: int = SIZE
) -> Path:
    """A data set of `train`, `validation` and `test` tiny samples in `format_name` at `root`.

    Without `test` samples it has no such split.
    """
    splits = [("train", 0, train), ("validation", 1000, validation)]
    if test:
        splits.append(("test", 2000, test))
    for split, first, count in splits:
        (root / split).mkdir(parents=True)
        for index in range(first, first + count):
            FORMATS[format_name].write(root / split, f"universe_{index:04d}_000", tiny_sample(index, size))
    return root


def config_file(path: Path, data: Path, /, **changes: object) -> Path:
    """A YAML file at `path` for a quick closed-rules run on `data`, with `changes` on top."""
    tree: dict[str, object] = {
        "data": {"dir": str(data)},
        "loader": {"batch_size": 4},
        "model": {"size": SIZE, "blocks": 3, "filters": 2, "dense": [16, 8], "dropout": 0.0},
        "schedule": {"initial_lr": 0.01, "base_lr": 0.02, "warmup_epochs": 1, "decay_epochs": [2],
                     "decay_factors": [0.25]},
        "log": {"every": 2, "checkpoint_every": 2},
        "seed": 5,
        "epochs": 4,
        "shuffle": True,
        "device": "cpu",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree | changes))
    return path


OPEN = {
    "model": {"kind": "open", "size": SIZE},
    "optimizer": {"kind": "adam"},
    "schedule": {"kind": "one_cycle", "peak_lr": 0.01},
    "symmetries": "periodic",
    "submission": {"division": "open"},
}
"""The changes that make `config_file`'s run one of the open network."""


def mpirun(ranks: int) -> list[str]:
    """What to put before a command line to run it on `ranks` ranks; nothing for one."""
    if ranks == 1:
        return []
    mpirun = str(Path(sys.executable).with_name("mpirun"))
    return [mpirun, "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]


def command(module: str, arguments: Sequence[object], ranks: int = 1) -> list[str]:
    """The command line of `python -m module` on `ranks` ranks."""
    return [*mpirun(ranks), sys.executable, "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment of a program under test: one thread, and mpirun allowed to root."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


@dataclass(frozen=True)
class Done:
    """A program that has ended."""

    code: int
    out: str
    err: str


def run(line: Sequence[str]) -> Done:
    """Run the command `line` in the checkout to its end."""
    done = subprocess.run(
        line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def start(line: Sequence[str], **variables: str) -> Forked | subprocess.Popen[str]:
    """Start the command `line` in the checkout, with `variables` in its environment.

    A command of this interpreter is forked from a process that has imported torch; see `forked`.
    """
    env = environment() | variables
    if line[0] == sys.executable and line[1] in ("-m", "-c") and not line[2].startswith("torch."):
        return Forked(line, cwd=ROOT, env=env)
    return subprocess.Popen(
        line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def program(module: str, *arguments: object, ranks: int = 1) -> Done:
    """Run `python -m module arguments...` to its end, on `ranks` ranks; a lone one in this process.

    The exit status is that of a rank that failed, if one did; the outputs follow each other by rank. What
    has to be a process of its own is for `start`, and what mpirun has to start for `command` and `run`.
    """
    if ranks > 1:
        with Ranks(command(module, arguments), range(ranks), ranks) as started:
            done = [
                (*process.communicate(timeout=240), process.wait()) for process in started.processes.values()
            ]
        outputs, errors, codes = zip(*done, strict=True)
        return Done(max(codes, key=abs), "".join(outputs), "".join(errors))
    out, err = io.StringIO(), io.StringIO()
    with (
        # What a process settles about its memory would be settled for all tests behind it.
        mock.patch.dict(os.environ, {"THP_MEM_ALLOC_ENABLE": "0"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = importlib.import_module(module).main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    return Done(status, out.getvalue(), err.getvalue())


def started_by(pid: int) -> list[int]:
    """The processes that `pid` has started, and theirs, as long as they are there."""
    children: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            children += map(int, path.read_text().split())
    return [one for child in children for one in (child, *started_by(child))]


def kill(pids: Iterable[int]) -> None:
    """Kill the processes `pids` (SIGKILL), those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(pids: Sequence[int], seconds: float = 30) -> None:
    """Return once none of the processes `pids` is there; TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            raise TimeoutError(f"of the processes {pids} some are still there after {seconds} s")
        time.sleep(0.01)


@contextlib.contextmanager
def inline_workers(*modules: str) -> Iterator[None]:
    """While the body runs, this process runs the tasks of `modules`, which saves the start of workers.

    By default those of conversion and verification.
    """

    def run_tasks(task: Callable[[Any], Any], items: Iterable[Any], *_: object) -> Iterator[tuple[Any, Any]]:
        for item in items:
            # As a worker receives and returns it.
            yield item, pickle.loads(pickle.dumps(task(pickle.loads(pickle.dumps(item)))))

    with contextlib.ExitStack() as stack:
        for module in modules or ("preprocess.conversion.engine", "preprocess.verify"):
            stack.enter_context(mock.patch(f"{module}.run_tasks", run_tasks))
        yield


def mounted(options: str, folder: Path, line: list[str]) -> list[str]:
    """`line` in a mount namespace of its own, where `folder` is a tmpfs with `options`.

    Behind what it prints come the lengths of the counts' files there.
    """
    found = f'find {folder} -name "*_data.npy" -printf "%s\\n"'
    script = f'mount -t tmpfs -o {options} none {folder} && "$@"; code=$?; {found}; exit $code'
    return ["unshare", "--map-root-user", "--mount", "bash", "-c", script, "bash", *line]


@functools.cache
def can_mount() -> bool:
    """Whether `mounted` works here."""
    return run(mounted("size=1m", Path("/mnt"), ["true"])).code == 0


class Ranks:
    """A program on ranks that are plain processes: a launcher that does not clean up by itself.

    processes: by rank. Use as a context; none outlives it.
    """

    def __init__(self, line: Sequence[str], ranks: Sequence[int], size: int, **variables: str) -> None:
        """Start the command `line` as the `ranks` of `size`, with `variables` in their environment.

        With a `size` of 1 it is told of no rank: a launcher may be the command.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

        def place(rank: int) -> dict[str, str]:
            return {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
            }

        self.processes = {
            rank: start(line, **((place(rank) if size > 1 else {}) | variables)) for rank in ranks
        }

    def end(self, seconds: float, *but: int) -> tuple[set[int], str]:
        """The exit statuses of all ranks `but` these, and what they said, once they have ended.

        TimeoutExpired where that takes more than `seconds`.
        """
        deadline = time.monotonic() + seconds
        done = {
            process: process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            for rank, process in self.processes.items()
            if rank not in but
        }
        return {process.wait() for process in done}, "".join(out + err for out, err in done.values())

    def wait_until_printed(self, text: str, seconds: float = 60) -> None:
        """Return once every rank, forked each, has written `text` to stdout; TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        for rank, process in self.processes.items():
            assert isinstance(process, Forked)
            while text not in process.printed():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} has not printed {text!r} in {seconds} s")
                time.sleep(0.02)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()
