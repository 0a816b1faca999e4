"""Groups of consecutive ranks, which share samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.distributed.session import COLLECTIVE_TIMEOUT, Session

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch.distributed as dist


def consecutive_ranks(size: int, backend: str | None = None) -> dist.ProcessGroup | None:
    """Return the group of `size` consecutive ranks that this rank is in; None if `size` is 1.

    All ranks take part; `size` must divide their number.

    Args:
        size: Number of ranks in each group.
        backend: That of `Session.connect` by default.
    """
    if size == 1:
        return None
    import torch.distributed as dist

    timeout = COLLECTIVE_TIMEOUT[backend or dist.get_backend()]
    return dist.new_subgroups(size, timeout=timeout, backend=backend)[0]


def maximum_over(session: Session, size: int) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Return a collective function: the maximum, by element, over each `size` consecutive ranks.

    All ranks take part.
    """
    import torch
    import torch.distributed as dist

    # On the host also with NCCL, so that it does not wait for the device.
    group = consecutive_ranks(size, "gloo")

    def maximum(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        result = torch.from_numpy(values.copy())
        # Not this rank is stuck, but the one that it waits for, which reports itself.
        with session.stall_guard(None):
            dist.all_reduce(result, dist.ReduceOp.MAX, group)
        return result.numpy()

    return maximum
