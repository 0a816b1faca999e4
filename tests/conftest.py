"""What many tests share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest_plugins = ["object_store"]

if not torch.cuda.is_available():
    # Read when Triton is imported, which torch may do before the tests of kernels.
    os.environ["TRITON_INTERPRET"] = "1"

# In a script's background job Ctrl-C is ignored, which the programs that tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine has not the hardware for."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")


@pytest.fixture(autouse=True)
def _mpirun_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own for what a test's mpirun notes: one that is killed leaves it behind.

    Elsewhere the next mpirun with the same process number finds it and does not start.
    """
    with tempfile.TemporaryDirectory(prefix="mpirun", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("PRTE_MCA_prte_tmpdir_base", folder)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 training and 7 validation samples of 16^3, as npy pairs."""
    # Here, for the tests that a Python without the data path's packages can run.
    from helpers import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny"), train=26, validation=7)
