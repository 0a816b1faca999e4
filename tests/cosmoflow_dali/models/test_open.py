"""The open network: its symmetries, and statistics over ranks that equal those of one rank."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Ranks
from torch.nn import functional

from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow, wrap
from pipelines.errors import ConfigError


@pytest.fixture
def volume() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 16, 16, generator=generator).abs() * 2


def test_wrap_pads_circularly(volume: torch.Tensor) -> None:
    expected = functional.pad(volume, (1,) * 6, mode="circular")
    torch.testing.assert_close(wrap(volume), expected, rtol=0, atol=0)


def test_parameter_count() -> None:
    assert sum(parameter.numel() for parameter in OpenCosmoFlow(OpenConfig()).parameters()) == 78_100


@pytest.mark.parametrize("multiscale", [False, True])
def test_shifted_periodic_boxes_have_the_same_output(volume: torch.Tensor, multiscale: bool) -> None:
    model = OpenCosmoFlow(OpenConfig(size=16, widths=(4, 8), multiscale=multiscale), seed=3).eval()
    with torch.no_grad():
        output = model(volume)
        for axis in (2, 3, 4):
            # Two blocks halve the box: a shift by four voxels maps pooling cells to pooling cells.
            for shift in (4, 8, -4):
                torch.testing.assert_close(model(volume.roll(shift, axis)), output, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(model(volume.flip(axis)), output, atol=1e-3)


def test_deeper_blocks_read_log_counts_in_cells() -> None:
    counts = torch.randint(0, 5, (2, 4, 8, 8, 8), generator=torch.Generator().manual_seed(5)).float()
    model = OpenCosmoFlow(OpenConfig(size=8, widths=(3, 5), multiscale=True)).eval()
    model.fit_input(np.zeros(4, np.float32), np.full(4, 2, np.float32))
    read: list[torch.Tensor] = []
    model.convs[1].register_forward_pre_hook(lambda conv, arguments: read.append(arguments[0]))
    model(counts.log1p())
    blocks = counts.reshape(2, 4, 4, 2, 4, 2, 4, 2).sum(dim=(3, 5, 7))
    expected = (blocks.log1p() - math.log(9)) / 2
    # `wrap` has padded it.
    torch.testing.assert_close(read[0][:, 3:, 1:-1, 1:-1, 1:-1], expected)


def test_features_begin_with_the_output(volume: torch.Tensor) -> None:
    for multiscale, means in ((False, 64), (True, 8 + 16 + 32 + 64)):
        model = OpenCosmoFlow(OpenConfig(size=16, multiscale=multiscale), seed=3).eval()
        with torch.no_grad():
            features = model.features(volume)
            torch.testing.assert_close(features[:, :4], model(volume))
        assert features.shape == (2, 4 + means)


def test_outputs_are_bounded(volume: torch.Tensor) -> None:
    with torch.no_grad():
        outputs = OpenCosmoFlow(OpenConfig(size=16), seed=3).eval()(100 * volume)
    assert outputs.shape == (2, 4)
    assert float(outputs.abs().max()) <= 1.2 + 1e-6


RANK = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow

if "connect" in sys.argv:
    dist.init_process_group("gloo", init_method="env://")
rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
model = OpenCosmoFlow(OpenConfig(size=16, multiscale="multiscale" in sys.argv), seed=3).double()
volume = torch.randn(4, 4, 16, 16, 16, generator=torch.Generator().manual_seed(4)).abs().double()
parallel = DistributedDataParallel(model) if ranks > 1 else model
parallel(volume.chunk(ranks)[rank]).square().mean().backward()
if rank == 0:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save(gradients | dict(model.named_buffers()), sys.argv[1])
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("options", [[], ["multiscale"]])
def test_two_ranks_have_the_gradients_and_statistics_of_one(tmp_path: Path, options: list[str]) -> None:
    found = []
    for size in (1, 2):
        path = tmp_path / f"{size}.pt"
        line = [sys.executable, "-c", RANK, str(path), *options, *(["connect"] if size > 1 else [])]
        with Ranks(line, range(size), size) as ranks:
            assert ranks.end(60) == ({0}, "")
        found.append(torch.load(path, weights_only=True))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_invalid_shapes_are_refused() -> None:
    settings: list[dict[str, object]] = [{"size": 24}, {"widths": ()}, {"hidden": 0}]
    for each in settings:
        with pytest.raises(ConfigError) as error:
            OpenConfig(**each)  # type: ignore[arg-type]
        assert [error.value.key] == list(each)
