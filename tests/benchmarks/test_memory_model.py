"""The model of a step's memory, against the tensors that steps hold."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory_model import peak_bytes
from benchmarks.spatial_model import Network
from cosmoflow_dali.config import CONFIGS, read_yaml, resolve
from cosmoflow_dali.models.build import ModelConfig, build_model
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.models.reference import ReferenceConfig
from pipelines.sample import REDSHIFTS


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that exist at once, but for those of `shapes`."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self._shapes, self._sizes, self.peak = shapes, dict[int, int](), 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `function` and count its results."""
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self._sizes and tensor.shape not in self._shapes:
                self._sizes[key] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, key)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


REFERENCE = ReferenceConfig(size=64, blocks=4)
OPEN = OpenConfig(size=64, widths=(16, 32, 64))
MULTISCALE = OpenConfig(size=64, multiscale=True)


@pytest.mark.parametrize(
    ("config", "blocks", "device"),
    [
        *((config, blocks, "cpu") for config in (REFERENCE, OPEN, MULTISCALE) for blocks in (0, 2)),
        # The meta device takes the blocks of a GPU, but for the open network's checkpointed ones.
        *((REFERENCE, blocks, "meta") for blocks in (0, 1)),
        *((config, 0, "meta") for config in (OPEN, MULTISCALE)),
    ],
)
def test_peak_is_that_of_a_step(config: ModelConfig, blocks: int, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = build_model(config, 0, blocks).to(device, dtype)
    volume = torch.ones(2, 64, 64, 64, 4, device=device, dtype=dtype).permute(0, 4, 1, 2, 3)
    with Held({parameter.shape for parameter in model.parameters()}) as held:
        model(volume).square().mean().backward()
    found = peak_bytes(
        Network.of(config),
        samples=2,
        width=dtype.itemsize,
        checkpoint_blocks=blocks,
        gpu=device != "cpu",
    )
    assert found == pytest.approx(held.peak, rel=0.15)


def test_rank_of_a_group_holds_its_part_and_its_halos() -> None:
    network = Network.of(ReferenceConfig(size=512, blocks=7))
    whole = peak_bytes(network, width=2)
    for group in (2, 4, 8):
        part = peak_bytes(network, (group, 1, 1), width=2)
        planes = 512 / group
        assert whole / group <= part < whole / group * (planes + 2) / planes * 1.05
    assert peak_bytes(network, samples=3) == 3 * peak_bytes(network)


def test_checkpointed_blocks_hold_their_input_alone() -> None:
    network = Network.of(ReferenceConfig(size=512, blocks=7))
    peaks = [peak_bytes(network, checkpoint_blocks=blocks) for blocks in range(3)]
    assert peaks == sorted(peaks, reverse=True)
    # All blocks: their inputs after the first, and what one of eight parts of the first takes.
    inputs = sum(block.inputs * block.edge**3 for block in network.blocks[1:])
    outputs = network.blocks[0].filters * math.prod((512 // 8 + 4, 512, 512))
    assert peak_bytes(network, checkpoint_blocks=7) < 4 * (3 * inputs + 3 * outputs)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_512_*.yaml")), ids=lambda path: path.stem)
def test_configurations_for_whole_universes_fit_their_gpus(path: Path) -> None:
    config = resolve(read_yaml(path))
    network, spatial = Network.of(config.model), config.parallel.spatial
    samples = config.compute.micro_batch or config.loader.batch_size
    peak = peak_bytes(network, (spatial, 1, 1), samples=samples, width=2)
    # Weights, gradients, the optimizer's numbers and the buckets of the all-reduce; batches of the loader.
    state = 20 * network.weights
    batches = 3 * config.loader.batch_size * len(REDSHIFTS) * (512 // spatial + 2) * 512**2 * 2
    assert peak + state + batches < 0.5 * 80e9
    assert samples * network.blocks[0].filters * 512**3 // spatial < 2**31
