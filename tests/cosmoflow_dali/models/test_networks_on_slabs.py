"""Networks whose ranks share samples: losses, gradients and weights of one rank with whole samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from helpers import Ranks
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cosmoflow_dali.compute import augment
from cosmoflow_dali.models.build import Model, ModelConfig, build_model
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.models.reference import ReferenceConfig

SIZE, STEPS, BATCH = 16, 4, 4

# With 4 ranks a sample, the slab of the third block is one plane: it reads joined volumes.
CONFIGS: dict[str, ModelConfig] = {
    "reference": ReferenceConfig(size=SIZE, blocks=3, filters=4, dense=(16, 8), dropout=0.0),
    "open": OpenConfig(size=SIZE, widths=(4, 8, 8), hidden=16),
    "multiscale": OpenConfig(size=SIZE, widths=(4, 8, 8), hidden=16, multiscale=True),
}

Result: TypeAlias = tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The volumes and targets of each step."""
    generator = torch.Generator().manual_seed(1)
    volumes = torch.randint(0, 9, (STEPS, BATCH, 4, SIZE, SIZE, SIZE), generator=generator).double().log1p()
    targets = torch.rand(STEPS, BATCH, 4, generator=generator, dtype=torch.float64)
    return list(zip(volumes, targets, strict=True))


def slab(volume: torch.Tensor, index: int, count: int, *, periodic: bool) -> torch.Tensor:
    """Return what the loader reads of `volume` for rank `index` of `count`."""
    padding = (0, 0, 0, 0, 1, 1)
    padded = functional.pad(volume, padding, mode="circular") if periodic else functional.pad(volume, padding)
    depth = volume.shape[2] // count
    return padded[:, :, index * depth : (index + 1) * depth + 2].contiguous(
        memory_format=torch.channels_last_3d
    )


def train(
    model: Model,
    wrapped: nn.Module,
    kind: augment.Symmetries,
    group: int,
    groups: int,
    index: int,
    count: int,
) -> Result:
    """Losses, first gradients, final state and an evaluation of part `index` of samples in `count` parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses: list[torch.Tensor] = []
    gradients: dict[str, torch.Tensor] = {}

    def part_of(volume: torch.Tensor) -> torch.Tensor:
        volume = volume.chunk(groups)[group]
        return volume if model.group is None else slab(volume, index, count, periodic=model.periodic)

    for step, (volume, target) in enumerate(batches()):
        part = part_of(volume)
        if kind:
            number = augment.draw(0, 0, step)
            part = augment.apply(part, kind, number, model.group, periodic=model.periodic)
        optimizer.zero_grad()
        loss = functional.mse_loss(wrapped(part), target.chunk(groups)[group])
        loss.backward()
        gradients = gradients or {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        outputs = model(part_of(batches()[0][0]))
    return torch.stack(losses), gradients, model.state_dict(), outputs


def check(expected: Result, name: str, kind: augment.Symmetries, count: int, checkpoint_blocks: int) -> None:
    """Compare the result of `count` ranks a sample with that of one rank."""
    group_of_rank = dist.new_subgroups(count)[0]
    model = build_model(CONFIGS[name], 1, checkpoint_blocks).double()
    model.group = group_of_rank if count > 1 else None
    rank, groups = dist.get_rank(), dist.get_world_size() // count
    losses, gradients, state, outputs = train(
        model, DistributedDataParallel(model), kind, rank // count, groups, rank % count, count
    )
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / dist.get_world_size(), expected[0], rtol=1e-12, atol=0)
    for found, exact in ((gradients, expected[1]), (state, expected[2])):
        assert found.keys() == exact.keys()
        for key, value in found.items():
            error, norm = (value - exact[key]).double().norm(), exact[key].double().norm()
            assert error <= 1e-12 * norm, (key, error, norm)
    mine = expected[3].chunk(groups)[rank // count]
    torch.testing.assert_close(outputs, mine, rtol=1e-11, atol=1e-13)


PROGRAM = """
import sys, torch
import torch.distributed as dist
sys.path.append(sys.argv[1])
from test_networks_on_slabs import check
dist.init_process_group("gloo", init_method="env://")
for name, kind, expected in torch.load(sys.argv[2]):
    for count in (2, 4):
        check(expected, name, kind, count, checkpoint_blocks=int(count == 2))
dist.barrier()
dist.destroy_process_group()
"""


def test_losses_gradients_and_weights_are_those_of_one_rank(tmp_path: Path) -> None:
    """In float64, with momentum, batch norm, symmetries, joined volumes, and 2 or 4 ranks a sample."""
    cases: list[tuple[str, augment.Symmetries]] = [
        ("reference", False),
        ("reference", True),
        ("open", "periodic"),
        ("multiscale", True),
    ]
    expected = []
    for name, kind in cases:
        model = build_model(CONFIGS[name], 1).double()
        expected.append((name, kind, train(model, model, kind, 0, 1, 0, 1)))
    torch.save(expected, tmp_path / "expected.pt")
    line = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(tmp_path / "expected.pt")]
    with Ranks(line, range(4), 4) as ranks:
        assert ranks.end(120) == ({0}, "")
