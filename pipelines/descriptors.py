"""How many files and lines this process may have open."""

from __future__ import annotations

import resource


def allow_open(count: int) -> int:
    """Have the system let this process have `count` open, or as many as it does let it; how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return max(allowed, soft)
