"""Huge pages: large tensors come and go with every step of a CPU's training."""

from __future__ import annotations

import os


def use_huge_pages() -> None:
    """Have torch ask the kernel for huge pages for tensors of 2 MB and more; before the first tensor is made.

    The C library gives every large tensor back to the kernel, which then has to find and to clear its
    pages again in the next step: of 4 KB each, that is a quarter of a step's time at 128^3. Without effect
    where the kernel has no transparent huge pages (/sys/kernel/mm/transparent_hugepage/enabled).
    THP_MEM_ALLOC_ENABLE=0 in the environment turns it off.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
