"""What a process that computes with torch settles once, before its first tensor."""

from __future__ import annotations

import ctypes
import os

import torch

from cosmoflow_dali.compute.step import Precision, configure_float32

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""What malloc.h of the GNU C library calls these parameters of mallopt()."""


def configure_torch(device: torch.device, cores: int, precision: Precision = "fp32") -> None:
    """Have torch use `cores` threads, memory on a CPU as is fastest, and float32 as `precision` says."""
    torch.set_num_threads(cores)
    configure_float32(precision)
    if device.type == "cpu":
        tune_malloc()


def tune_malloc() -> None:
    """Have large tensors lie in huge pages, which the process keeps; before the first tensor is made.

    The C library gives every large tensor back to the kernel, which then has to find and to clear its
    pages again in the next step: a quarter of a step's time at 128^3 where they are of 4 KB, up to a tenth
    where torch asks for pages of 2 MB. What the main thread frees stays the process's instead, peaks
    included, and what lies between large tensors makes steps take up to half as much memory again; it is
    level after some steps, as long as no step leaves something behind for good. Huge pages are without
    effect where the kernel has none (/sys/kernel/mm/transparent_hugepage/enabled), keeping under other C
    libraries and allocators. Nothing is done where the environment has THP_MEM_ALLOC_ENABLE=0, or
    settings of its own for malloc.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ)
    if os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1") == "0" or own:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
