"""What ran a program: versions and hardware, for summaries and benchmark results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from cosmoflow_dali import __version__
from pipelines.distributed.world import available_cores
from pipelines.formats.packed.gather_cpu import COMPILED

_PACKAGES = (
    "torch",
    "triton",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "numpy",
    "apex",
    "mpi4py",
    "deflate",
    "mlperf-logging",
)


def versions() -> dict[str, str]:
    """The versions of Python and of what decides speed or results; whether rows.c is built."""
    found = {"cosmoflow-dali": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    found["pipelines/rows.c"] = "built" if COMPILED else "not built"
    return found


def hardware() -> dict[str, Any]:
    """The processor, the cores this process may use, torch's threads, memory in bytes, and GPUs."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
