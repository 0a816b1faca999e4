"""Memory that the C library keeps: large tensors come and go with every step of a CPU's training."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""mallopt(3)'s."""


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for what is asked for next; False where there is another C library.

    Otherwise it gives every tensor of more than 32 MB back to the kernel, which then has to find and
    to clear its pages again in every step: a third of the time of a step at 128^3. The process stays as
    large as it has once been.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 1 << 28}
    return all(mallopt(option, value) == 1 for option, value in settings.items())
