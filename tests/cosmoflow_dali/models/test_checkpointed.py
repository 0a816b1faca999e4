"""Checkpointed blocks: they equal the whole blocks, alone, in both networks, and on two ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import Ranks

from cosmoflow_dali.models.blocks import max_block, norm_block, pool_then_activate
from cosmoflow_dali.models.build import ModelConfig, build_model
from cosmoflow_dali.models.checkpointed import checkpointed_max_block, checkpointed_norm_block, split_depth
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.models.reference import ReferenceConfig

NETWORKS: dict[str, ModelConfig] = {
    "reference": ReferenceConfig(size=32, blocks=3, filters=4, dropout=0.5),
    "open": OpenConfig(size=32, widths=(4, 8, 8)),
    "multiscale": OpenConfig(size=32, widths=(4, 8, 8), multiscale=True),
}


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def result_and_gradients(
    block: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], *inputs: torch.Tensor
) -> list[torch.Tensor]:
    """Return all that `block` returns of `inputs`, and their gradients by a varied sum of the first."""
    results = block(*inputs)
    found = [results] if isinstance(results, torch.Tensor) else list(results)
    weights = random(*found[0].shape).detach()
    return [*found, *torch.autograd.grad((found[0] * weights).sum(), inputs)]


def test_parts_are_equal_and_even() -> None:
    assert split_depth(128)[:2] == [(0, 16), (16, 32)] and len(split_depth(128)) == 8
    assert split_depth(36) == [(0, 18), (18, 36)]
    assert split_depth(64) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert split_depth(34) == [(0, 34)] and split_depth(2) == [(0, 2)]


@pytest.mark.parametrize("depth", [2, 36, 64])
@pytest.mark.parametrize("block", [max_block, pool_then_activate])
def test_checkpointed_max_block_equals_the_whole(
    block: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], depth: int
) -> None:
    inputs = random(2, 3, depth, 2, 4), random(5, 3, 3, 3, 3), random(5)
    found = result_and_gradients(lambda *each: checkpointed_max_block(block, *each), *inputs)
    torch.testing.assert_close(found, result_and_gradients(block, *inputs))


@pytest.mark.parametrize("depth", [2, 36, 64])
def test_checkpointed_norm_block_equals_the_whole(depth: int) -> None:
    inputs = random(2, 3, depth, 2, 4), random(5, 3, 3, 3, 3), random(5), random(5)
    found = result_and_gradients(partial(checkpointed_norm_block, eps=1e-3), *inputs)
    torch.testing.assert_close(found, result_and_gradients(partial(norm_block, eps=1e-3), *inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointed_networks_have_the_gradients_and_statistics_of_whole_ones(name: str) -> None:
    volume = random(1, 4, 32, 32, 32).detach().abs()
    whole, held = None, []
    for blocks in range(4):
        model = build_model(NETWORKS[name], 1, blocks).double()
        stored: dict[int, int] = {}

        def note(tensor: torch.Tensor, stored: dict[int, int] = stored) -> torch.Tensor:
            stored[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        # The same dropout each time.
        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(volume).square().sum()
        held.append(sum(stored.values()))
        loss.backward()
        with torch.no_grad():
            validation = model.eval()(volume)
        gradients = [parameter.grad for parameter in model.parameters()]
        found = [*gradients, *model.buffers(), loss.detach(), validation]
        whole = whole or found
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)
    assert held == sorted(held, reverse=True) and held[1] < 0.8 * held[0]


RANK = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.models.reference import ReferenceConfig

dist.init_process_group("gloo", init_method="env://")
volume = torch.randn(2, 4, 32, 32, 32, generator=torch.Generator().manual_seed(4)).abs().double()
shapes = ReferenceConfig(size=32, blocks=3, filters=4, dropout=0.0), OpenConfig(size=32, widths=(4, 8, 8))
for shape in shapes:
    found = []
    for blocks, ranks in ((0, 1), (0, 2), (2, 2)):
        model = build_model(shape, 3, blocks).double()
        if ranks == 2:
            model = DistributedDataParallel(model)
        elif isinstance(shape, OpenConfig):
            # Batch normalisation covers both ranks, so one rank alone has no counterpart here.
            continue
        for _ in range(2):
            model.zero_grad()
            model(volume.chunk(ranks)[dist.get_rank() % ranks]).square().mean().backward()
        found.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-9, atol=1e-12)
dist.destroy_process_group()
"""


def test_two_ranks_with_checkpointed_blocks_have_the_gradients_of_whole_blocks() -> None:
    with Ranks([sys.executable, "-c", RANK], range(2), 2) as ranks:
        assert ranks.end(60) == ({0}, "")
