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


def transform(counts: npt.NDArray[np.int16], *, apply_log: bool) -> npt.NDArray[np.float32]:
    """What the network sees of `counts` (D, H, W, C): float32 of that shape."""
    values = counts.astype(np.float32)
    return np.log1p(values) if apply_log else values / values.mean(dtype=np.float64).astype(np.float32)


def transform_node(counts: Any, *, apply_log: bool) -> Any:
    """The same of the DALI node `counts`, on the device that it is on.

    Every int16 has its logarithm in a table: a fifth of the cost of casting and taking it. What is
    not in the table, a count below zero, becomes NaN, so that it cannot pass for a sample.
    """
    from nvidia.dali import fn, types

    if not apply_log:
        values = fn.cast(counts, dtype=types.FLOAT)
        return values / fn.reductions.mean(values)
    return fn.lookup_table(
        counts,
        keys=list(range(len(LOGS))),
        values=LOGS.tolist(),
        default_value=float("nan"),
        dtype=types.FLOAT,
    )
