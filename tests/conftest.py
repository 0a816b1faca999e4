"""What many tests share: a small data set, and a way to run the programs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, Done, command, environment, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training and 7 validation samples of 16^3, as npy pairs."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), train=26, validation=7)


@pytest.fixture
def program() -> Callable[..., Done]:
    """Run `python -m module arguments...` to its end, on `ranks` ranks."""

    def run(module: str, *arguments: object, ranks: int = 1) -> Done:
        done = subprocess.run(
            command(module, arguments, ranks),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run
