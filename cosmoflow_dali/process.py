"""What a process that computes with torch settles once, before its first tensor."""

from __future__ import annotations

import os

import torch

from cosmoflow_dali.step import Precision, settle_float32


def settle_process(device: torch.device, cores: int, precision: Precision = "fp32") -> None:
    """Have torch use `cores` threads, huge pages on a CPU, and float32 as `precision` says."""
    torch.set_num_threads(cores)
    settle_float32(precision)
    if device.type == "cpu":
        use_huge_pages()


def use_huge_pages() -> None:
    """Have torch ask the kernel for huge pages for tensors of 2 MB and more; before the first tensor is made.

    The C library gives every large tensor back to the kernel, which then has to find and to clear its
    pages again in the next step: of 4 KB each, that is a quarter of a step's time at 128^3. Without effect
    where the kernel has no transparent huge pages (/sys/kernel/mm/transparent_hugepage/enabled).
    THP_MEM_ALLOC_ENABLE=0 in the environment turns it off.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
