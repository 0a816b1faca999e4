"""Versions and hardware, for summaries and benchmark results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cosmoflow_dali import __version__
from pipelines.distributed.world import available_cores
from pipelines.formats.packed import distinct, gather_cpu

_PACKAGES = "torch triton nvidia-dali-cuda120 nvidia-dali-cuda130 numpy apex mpi4py deflate mlperf-logging"


def versions() -> dict[str, str]:
    """Return the versions of everything that affects speed or results, and which C files are compiled."""
    found = {"cosmoflow-dali": __version__, "python": platform.python_version()}
    for package in _PACKAGES.split():
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    for name, compiled in (("rows.c", gather_cpu.COMPILED), ("distinct.c", distinct.COMPILED)):
        found[f"pipelines/{name}"] = "built" if compiled else "not built"
    return found


def hardware() -> dict[str, Any]:
    """Return the processor, usable cores, torch's threads, memory in bytes, and GPUs."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in range(gpus)],
    }


def _cpu_model() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
