"""Settings of a process that computes with torch, made before its first tensor."""

from __future__ import annotations

import ctypes
import os

import torch

from cosmoflow_dali.compute.step import Precision, configure_float32

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of mallopt(), from malloc.h of the GNU C library."""


def configure_torch(device: torch.device, cores: int, precision: Precision = "fp32") -> None:
    """Set torch's threads to `cores`, float32 rounding by `precision`, cuDNN's search, and a CPU's malloc."""
    torch.set_num_threads(cores)
    configure_float32(precision)
    # Shapes are constant, so cuDNN's search for the fastest algorithm pays.
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        tune_malloc()


def tune_malloc() -> None:
    """Place large tensors in huge pages and keep freed memory in the process.

    Must run before the first tensor is made. By default the C library returns each large tensor to the
    kernel, which has to find and clear the pages again in the next step: a quarter of a step's time at 128^3
    with pages of 4 KB, and up to a tenth with torch's pages of 2 MB.

    The process keeps its peak memory. Fragmentation can raise it by half; it levels off after some steps.
    Huge pages have no effect where the kernel has none (/sys/kernel/mm/transparent_hugepage/enabled), and
    keeping none with other C libraries and allocators. Nothing changes if the environment has
    THP_MEM_ALLOC_ENABLE=0 or settings for malloc (MALLOC_*).
    """
    user_settings = any(name.startswith("MALLOC_") for name in os.environ)
    if os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1") == "0" or user_settings:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
