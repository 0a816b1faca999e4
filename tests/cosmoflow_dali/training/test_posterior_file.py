"""The file of a run's posteriors, and what it is refused for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cosmoflow_dali.posterior.fitted import Features, FittedPosteriors, fit_posteriors
from cosmoflow_dali.training.posterior_file import POSTERIOR, load_posteriors, save_posteriors
from pipelines.errors import DataError

WEIGHTS = "epoch00001_sample000000000.pt"


def network() -> nn.Module:
    """Return a network with weights and statistics."""
    linear = nn.Linear(4, 4)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.BatchNorm1d(4))


def simulate(samples: int, seed: int) -> Features:
    rng = np.random.default_rng(seed)
    targets = rng.uniform(-1, 1, (samples, 4))
    noise = 0.3 * rng.standard_normal((samples, 12))
    names = tuple(f"set{seed}universe{index:05d}_000" for index in range(samples))
    return Features(names, np.tile(targets, 3) + noise, targets + noise[:, :4], targets)


@pytest.fixture(scope="module")
def fitted() -> FittedPosteriors:
    return fit_posteriors(None, simulate(60, 0), 6, seed=0)


@pytest.fixture(scope="module")
def saved(fitted: FittedPosteriors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of checkpoints with the posteriors of `network()`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.save(network().state_dict(), folder / WEIGHTS)
    assert save_posteriors(folder, fitted, network()) == folder / POSTERIOR
    return folder


def test_loaded_posteriors_have_equal_densities_and_draws(saved: Path, fitted: FittedPosteriors) -> None:
    loaded, fresh = load_posteriors(saved / WEIGHTS, network()), simulate(9, 1)
    assert loaded.names == fitted.names and loaded.best == fitted.best
    for name in fitted.names:
        (one, numbers), (other, others) = (each.conditioned(name, fresh) for each in (fitted, loaded))
        np.testing.assert_array_equal(
            one.log_density(numbers, fresh.targets), other.log_density(others, fresh.targets)
        )
        np.testing.assert_array_equal(one.sample(numbers, 20, 3), other.sample(others, 20, 3))


def test_file_of_the_same_fit_is_the_same(saved: Path, fitted: FittedPosteriors, tmp_path: Path) -> None:
    assert save_posteriors(tmp_path, fitted, network()).read_bytes() == (saved / POSTERIOR).read_bytes()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "one bit": flip_a_bit,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "weights": lambda path: shutil.copy(path.with_name(WEIGHTS), path),
    "another type": lambda path: torch.save([1, 2], path),
    "a later version": lambda path: torch.save(torch.load(path) | {"posterior_version": 99}, path),
    "code": lambda path: torch.save(network(), path),
    "a folder": replace_by_folder,
}


@pytest.mark.parametrize("damage", FAULTS.values(), ids=FAULTS)
def test_file_that_holds_no_posteriors_is_refused_by_name(
    damage: Callable[[Path], object], saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    damage(folder / POSTERIOR)
    with pytest.raises(DataError) as refusal:
        load_posteriors(folder / WEIGHTS, network())
    assert refusal.value.path == str(folder / POSTERIOR)
    assert "\n" not in str(refusal.value)


def retrain(model: nn.Module) -> None:
    model[0].weight.data[0, 0] += 1e-6  # type: ignore[index]


def collect_statistics(model: nn.Module) -> None:
    model.train()(torch.ones(2, 4))


@pytest.mark.parametrize("change", [retrain, collect_statistics])
def test_posteriors_of_other_weights_are_refused(change: Callable[[nn.Module], None], saved: Path) -> None:
    # Their features would mean something else: every density would be wrong, without a sign of it.
    model = network()
    change(model)
    with pytest.raises(DataError) as refusal:
        load_posteriors(saved / WEIGHTS, model)
    assert refusal.value.path == str(saved / POSTERIOR)
    assert WEIGHTS in refusal.value.fault
