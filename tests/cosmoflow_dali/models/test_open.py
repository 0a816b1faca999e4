"""The open network: the symmetries it claims, and sums over ranks that are those of one rank."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Done, mpirun, run, write_tiny
from torch import nn
from torch.nn import functional

from cosmoflow_dali.compute import augment
from cosmoflow_dali.models.open import BatchNorm, OpenConfig, OpenCosmoFlow, wrap
from pipelines.dataset.open import open_split
from pipelines.errors import ConfigError
from pipelines.loading.input_stats import input_statistics
from pipelines.loading.reader import Reader


@pytest.fixture
def volume() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 16, 16, generator=generator)


def network() -> OpenCosmoFlow:
    return OpenCosmoFlow(OpenConfig(size=16), seed=3)


def test_wrapping_is_circular_padding(volume: torch.Tensor) -> None:
    torch.testing.assert_close(
        wrap(volume), functional.pad(volume, (1,) * 6, mode="circular"), rtol=0, atol=0
    )


def test_the_size_that_was_measured() -> None:
    assert sum(parameter.numel() for parameter in OpenCosmoFlow(OpenConfig()).parameters()) == 78_100


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_where_the_box_is_cut_does_not_matter(axis: int, volume: torch.Tensor) -> None:
    model = OpenCosmoFlow(OpenConfig(size=16, widths=(4, 8)), seed=3).eval()
    with torch.no_grad():
        answer = model(volume)
        # Two blocks halve the box: a move by four voxels takes pooling cells to pooling cells.
        for shift in (4, 8, -4):
            torch.testing.assert_close(model(volume.roll(shift, dims=axis)), answer, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(volume.flip(axis)), answer, atol=1e-3)


def test_answers_stay_within_a_little_of_the_targets_range(volume: torch.Tensor) -> None:
    with torch.no_grad():
        answers = network().eval()(100 * volume)
    assert answers.shape == (2, 4)
    assert float(answers.abs().max()) <= 1.2


def test_input_is_standardised_by_the_training_set(tmp_path: Path) -> None:
    split = open_split(write_tiny(tmp_path / "data", train=20, validation=1), "train")
    mean, std = input_statistics(Reader(split), apply_log=True)
    stack = np.log1p(np.stack([split.read(index).counts for index in range(20)]).astype(np.float64))
    np.testing.assert_allclose(mean, stack.mean(axis=(0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, stack.std(axis=(0, 1, 2, 3)), rtol=1e-4)


def test_batch_normalisation_on_one_rank_is_torchs(volume: torch.Tensor) -> None:
    ours, torchs = BatchNorm(4), nn.BatchNorm3d(4)
    torch.testing.assert_close(ours(volume), torchs(volume))
    torch.testing.assert_close(ours.running_var, torchs.running_var)


_ON_A_RANK = """
import sys, torch
from torch.nn.parallel import DistributedDataParallel
from pipelines.distributed.cli import report_errors
from pipelines.distributed.world import World
from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow

world, cpu = World.detect(), torch.device("cpu")
with report_errors(world) as session:
    session.connect(cpu)
    model = OpenCosmoFlow(OpenConfig(size=16), seed=3).double()
    generator = torch.Generator().manual_seed(4)
    volume = torch.randn(4, 4, 16, 16, 16, generator=generator).double()
    share = volume.chunk(world.size)[world.rank]
    parallel = DistributedDataParallel(model) if world.size > 1 else model
    parallel(share).square().mean().backward()
    if world.is_root:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save(gradients | dict(model.named_buffers()), sys.argv[1])
"""


def test_two_ranks_have_the_gradients_and_statistics_of_one(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.pt"
        done: Done = run([*mpirun(ranks), sys.executable, "-c", _ON_A_RANK, str(path)])
        assert done.code == 0, done.err
        found.append(torch.load(path, weights_only=True))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_the_48_symmetries_are_those_of_the_cube() -> None:
    volume = torch.arange(3 * 27.0).reshape(1, 3, 3, 3, 3)
    images = {tuple(augment.apply(volume, number).flatten().tolist()) for number in range(48)}
    assert len(images) == 48
    # Neighbours stay neighbours, and the centre the centre.
    for number in range(48):
        turned = augment.apply(volume, number)[0, 0].flatten().tolist()
        a, b, c = (np.array(np.unravel_index(turned.index(value), (3, 3, 3))) for value in (0.0, 1.0, 13.0))
        assert np.abs(a - b).sum() == 1 and (c == 1).all()


def test_redshifts_stay_where_they_are_and_memory_stays_channels_last(volume: torch.Tensor) -> None:
    for number in range(48):
        turned = augment.apply(volume, number)
        assert turned.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(turned.sum(dim=(2, 3, 4)), volume.sum(dim=(2, 3, 4)), rtol=1e-4, atol=1e-3)


def test_all_symmetries_are_drawn_and_the_step_alone_decides() -> None:
    drawn = [augment.draw(1, 0, step) for step in range(2000)]
    assert set(drawn) == set(range(48))
    assert drawn == [augment.draw(1, 0, step) for step in range(2000)]
    assert drawn != [augment.draw(1, 1, step) for step in range(2000)]


@pytest.mark.parametrize(
    ("settings", "key"), [({"size": 24}, "size"), ({"widths": ()}, "widths"), ({"hidden": 0}, "hidden")]
)
def test_shapes_that_do_not_work_are_refused(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} = "):
        OpenConfig(**settings)  # type: ignore[arg-type]
