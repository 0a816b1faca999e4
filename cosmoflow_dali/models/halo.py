"""Exchange between ranks, each of which holds a slab of every volume, cut along D.

All functions are collective operations, forward and backward: all ranks of a group must call them, in the
same order. Their gradients are those of the sum of all ranks' losses, as `DistributedDataParallel` expects.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def add_halos(slab: torch.Tensor, group: dist.ProcessGroup | None, *, periodic: bool) -> torch.Tensor:
    """Return `slab` between the next planes of its neighbours, as a 3^3 convolution reads it.

    The backward pass adds the gradients of the halos to those of the planes that were copied.

    Args:
        slab: (B, C, d, H, W) with d at least 1; only d may differ between ranks.
        group: Ranks whose slabs, in the group's order, are a volume; None if `slab` is all of it.
        periodic: The planes beyond the ends are those of the other end instead of zeros.

    Returns:
        (B, C, d + 2, H, W), channels-last.
    """
    padded: torch.Tensor = _AddHalos.apply(slab, group, periodic)
    return padded


def join_slabs(slab: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return on every rank the volume (B, C, D, H, W), channels-last, of equal slabs (B, C, d, H, W)."""
    joined: torch.Tensor = _JoinSlabs.apply(slab, group)
    return joined


def mean_over_group(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the mean of `value` over the ranks of `group`."""
    mean: torch.Tensor = _MeanOverGroup.apply(value, group)
    return mean


class _AddHalos(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, slab: torch.Tensor, group: dist.ProcessGroup | None, periodic: bool
    ) -> torch.Tensor:
        context.group, context.periodic = group, periodic
        rows = slab.permute(0, 2, 3, 4, 1)
        batch, depth, *others = rows.shape
        padded = rows.new_empty(batch, depth + 2, *others)
        padded[:, 1:-1] = rows
        padded[:, 0], padded[:, -1] = _swap(rows[:, 0], rows[:, -1], group, periodic=periodic)
        return padded.permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows = gradient.permute(0, 2, 3, 4, 1)
        below, above = _swap(rows[:, 0], rows[:, -1], context.group, periodic=context.periodic)
        own = rows[:, 1:-1].clone(memory_format=torch.contiguous_format)
        own[:, 0] += below
        own[:, -1] += above
        return own.permute(0, 4, 1, 2, 3), None, None


class _JoinSlabs(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, slab: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        context.group = group
        rows = slab.permute(0, 2, 3, 4, 1).contiguous()
        slabs = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(slabs, rows, group)
        return torch.cat(slabs, 1).permute(0, 4, 1, 2, 3)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = gradient.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(rows, group=context.group)
        own = rows.chunk(dist.get_world_size(context.group), 1)[dist.get_rank(context.group)]
        return own.permute(0, 4, 1, 2, 3), None


class _MeanOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        context.group = group
        return _mean(value, group)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _mean(gradient, context.group), None


def _mean(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    mean = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(mean, group=group)
    return mean.div_(dist.get_world_size(group))


def _swap(
    first: torch.Tensor, last: torch.Tensor, group: dist.ProcessGroup | None, *, periodic: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send `first` to the rank below and `last` to the rank above.

    Returns:
        The `last` of the rank below and the `first` of the rank above; zeros where there is no such rank.
    """
    if group is None or dist.get_world_size(group) == 1:
        return (last, first) if periodic else (torch.zeros_like(last), torch.zeros_like(first))
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    from_below, from_above = (
        torch.zeros_like(plane, memory_format=torch.contiguous_format) for plane in (last, first)
    )
    # NCCL matches the messages of two ranks by their order, gloo by tags also.
    upward = [(dist.isend, last.contiguous(), rank + 1), (dist.irecv, from_below, rank - 1)]
    downward = [(dist.isend, first.contiguous(), rank - 1), (dist.irecv, from_above, rank + 1)]
    messages = [
        dist.P2POp(send_or_receive, plane, dist.get_global_rank(group, peer % size), group, tag)
        for tag, direction in enumerate((upward, downward))
        for send_or_receive, plane, peer in direction
        if periodic or 0 <= peer < size
    ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return from_below, from_above
