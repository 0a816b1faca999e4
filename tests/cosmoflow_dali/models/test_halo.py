"""Exchange of slabs: halos equal the padding of the joined volume, and gradients are those of all losses."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import Ranks
from torch.nn import functional

from cosmoflow_dali.models.halo import add_halos


def padded_along_depth(volume: torch.Tensor, *, periodic: bool) -> torch.Tensor:
    if periodic:
        return functional.pad(volume, (0, 0, 0, 0, 1, 1), mode="circular")
    return functional.pad(volume, (0, 0, 0, 0, 1, 1))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("periodic", [False, True])
def test_halos_of_a_single_rank_are_padding(depth: int, periodic: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    volume = torch.randn(2, 3, depth, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    expected = padded_along_depth(volume, periodic=periodic)
    torch.testing.assert_close(add_halos(volume, None, periodic=periodic), expected, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda slab: add_halos(slab, None, periodic=periodic), volume)


RANK = """
import itertools, sys, torch
import torch.distributed as dist
sys.path.append(sys.argv[1])
from test_halo import padded_along_depth
from cosmoflow_dali.models.halo import add_halos, join_slabs, mean_over_group

dist.init_process_group("gloo", init_method="env://")
generator = torch.Generator().manual_seed(1)
groups = dist.group.WORLD, dist.new_subgroups(2)[0], dist.new_subgroups(1)[0]
for group, periodic in itertools.product(groups, (False, True)):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # Of different depths, one plane too.
    depths = [1 + (each + 1) % 3 for each in range(size)]
    slabs = [slice(end - depth, end) for end, depth in zip(itertools.accumulate(depths), depths)]
    volume = torch.randn(2, 3, sum(depths), 4, 5, generator=generator, dtype=torch.float64)
    joined = volume.clone().requires_grad_()
    padded = padded_along_depth(joined, periodic=periodic)
    parts = [padded[:, :, each.start : each.stop + 2] for each in slabs]
    weights = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in parts]
    sum((part * weight).sum() for part, weight in zip(parts, weights)).backward()
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        slab = volume[:, :, slabs[rank]].clone(memory_format=layout).requires_grad_()
        found = add_halos(slab, group, periodic=periodic)
        (found * weights[rank]).sum().backward()
        torch.testing.assert_close(found, parts[rank], rtol=0, atol=0)
        torch.testing.assert_close(slab.grad, joined.grad[:, :, slabs[rank]], rtol=1e-14, atol=1e-14)
    half = add_halos(volume[:, :, slabs[rank]].bfloat16(), group, periodic=periodic)
    torch.testing.assert_close(half, parts[rank].bfloat16(), rtol=0, atol=0)
for group in groups:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    volume = torch.randn(2, 3, 2 * size, 4, 5, generator=generator, dtype=torch.float64)
    # Each rank has a loss of its own, as with dropout.
    weights = torch.randn(size, *volume.shape, generator=generator, dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        slab = volume.chunk(size, 2)[rank].to(dtype).requires_grad_()
        joined = join_slabs(slab, group)
        torch.testing.assert_close(joined, volume.to(dtype), rtol=0, atol=0)
    slab = volume.chunk(size, 2)[rank].clone().requires_grad_()
    (join_slabs(slab, group) * weights[rank]).sum().backward()
    torch.testing.assert_close(slab.grad, weights.sum(0).chunk(size, 2)[rank])
    slab = volume.chunk(size, 2)[rank].clone().requires_grad_()
    mean = mean_over_group(slab, group)
    parts = torch.stack(volume.chunk(size, 2))
    torch.testing.assert_close(mean, parts.mean(0))
    (mean * weights[rank].chunk(size, 2)[0]).sum().backward()
    torch.testing.assert_close(slab.grad, weights.chunk(size, 3)[0].mean(0))
dist.barrier()
dist.destroy_process_group()
"""


def test_slabs_of_1_2_and_4_ranks_are_those_of_the_joined_volume(
    request: pytest.FixtureRequest,
) -> None:
    line = [sys.executable, "-c", RANK, str(request.path.parent)]
    with Ranks(line, range(4), 4) as ranks:
        assert ranks.end(60) == ({0}, "")
