"""Transforms of counts before they enter the network, each in numpy and as a DALI node.

Both are those of the reference (mlcommons/hpc cosmoflow/data/cosmo.py): log(count + 1), or the counts
divided by their mean over the whole sample, all redshifts together.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError
from pipelines.sample import COUNT_LIMIT


def lookup_table(*, apply_log: bool) -> npt.NDArray[np.float32]:
    """Return the value of each possible count, (COUNT_LIMIT,) float32, before any division by a mean.

    Logarithms are rounded from double precision.
    """
    counts = np.arange(COUNT_LIMIT, dtype=np.float64)
    return (np.log1p(counts) if apply_log else counts).astype(np.float32)


def transform(counts: npt.NDArray[np.int16], *, apply_log: bool) -> npt.NDArray[np.float32]:
    """Return the network's input for `counts` (D, H, W, C), float32 of the same shape."""
    values = counts.astype(np.float32)
    return np.log1p(values) if apply_log else values / values.mean(dtype=np.float64).astype(np.float32)


def check_input(
    path: str | os.PathLike[str],
    counts: npt.NDArray[np.int16],
    *,
    apply_log: bool,
    largest: float = math.inf,
) -> None:
    """Raise DataError for `path` unless `transform` of its `counts` is finite and at most `largest`."""
    if apply_log:
        return
    highest = int(counts.max())
    if highest == 0:
        fault = "holds no particles, and counts cannot be divided by a mean of zero"
        raise DataError(path, fault, "set loader.apply_log to true, or remove the sample")
    if largest < math.inf and (ratio := highest / counts.mean(dtype=np.float64)) > largest:
        fault = f"a count is {ratio:.4g} times the mean, beyond the {largest:g} of compute.precision"
        raise DataError(path, fault, "use another precision, or set loader.apply_log to true")


def lookup_node(counts: Any, *, apply_log: bool) -> Any:
    """Return the DALI node that replaces `counts` by their values in `lookup_table`, on the same device.

    This costs a fifth of a cast and a logarithm. A count that is not in the table, one below zero,
    becomes NaN, so that it cannot be mistaken for valid.
    """
    from nvidia.dali import fn, types

    table = lookup_table(apply_log=apply_log)
    return fn.lookup_table(
        counts,
        keys=list(range(len(table))),
        values=table.tolist(),
        default_value=float("nan"),
        dtype=types.FLOAT,
    )


def transform_node(counts: Any, *, apply_log: bool) -> Any:
    """Return `transform` of the DALI node `counts`; NaN for counts below zero and for their mean."""
    from nvidia.dali import fn

    values = lookup_node(counts, apply_log=apply_log)
    return values if apply_log else values / fn.reductions.mean(values)
