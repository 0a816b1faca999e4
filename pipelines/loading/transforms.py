"""What happens to counts before the network sees them: each transform as numpy truth and as DALI node.

Either is the reference's (mlcommons/hpc cosmoflow/data/cosmo.py): log(count + 1), or the counts
divided by their mean over the whole sample, all redshifts together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.sample import COUNT_LIMIT

LOGS = np.log1p(np.arange(COUNT_LIMIT), dtype=np.float64).astype(np.float32)
"""log(count + 1) of every count, rounded from double precision."""

COUNTS = np.arange(COUNT_LIMIT, dtype=np.float32)
"""Every count as it is."""


def table_of(*, apply_log: bool) -> npt.NDArray[np.float32]:
    """What becomes of each count, before anything is divided by a mean: float32 (COUNT_LIMIT,)."""
    return LOGS if apply_log else COUNTS


def transform(counts: npt.NDArray[np.int16], *, apply_log: bool) -> npt.NDArray[np.float32]:
    """What the network sees of `counts` (D, H, W, C): float32 of that shape."""
    values = counts.astype(np.float32)
    return np.log1p(values) if apply_log else values / values.mean(dtype=np.float64).astype(np.float32)


def lookup_node(counts: Any, *, apply_log: bool) -> Any:
    """The DALI node `counts` by `table_of`, on the device that it is on.

    That costs a fifth of casting and taking the logarithm. What is not in the table, a count below
    zero, becomes NaN, so that it cannot pass for a sample.
    """
    from nvidia.dali import fn, types

    table = table_of(apply_log=apply_log)
    return fn.lookup_table(
        counts,
        keys=list(range(len(table))),
        values=table.tolist(),
        default_value=float("nan"),
        dtype=types.FLOAT,
    )


def transform_node(counts: Any, *, apply_log: bool) -> Any:
    """`transform` of the DALI node `counts`; NaN where a count is below zero, as is the mean of such."""
    from nvidia.dali import fn

    values = lookup_node(counts, apply_log=apply_log)
    return values if apply_log else values / fn.reductions.mean(values)
