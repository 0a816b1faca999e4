"""The reference network against Keras: outputs, gradients, and SGD with a changing learning rate.

tests/data/keras_small.npz was written by TensorFlow 2.15: the network at 32^3 with three blocks of
four filters and dense layers of 16 and 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from cosmoflow_dali.model import CosmoFlow, ReferenceConfig, from_reference_weights
from cosmoflow_dali.optim import SGDConfig, build_optimizer, set_lr
from cosmoflow_dali.step import forward_backward
from pipelines.errors import UserError
from pipelines.sample import Batch

Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def keras() -> Arrays:
    with np.load(Path(__file__).parent.parent / "data" / "keras_small.npz") as archive:
        return dict(archive)


@pytest.fixture
def batch(keras: Arrays) -> Batch:
    volume = torch.from_numpy(np.log1p(keras["counts"].astype(np.float32))).permute(0, 4, 1, 2, 3)
    return Batch(volume, torch.from_numpy(keras["targets"]), np.arange(2))


def named(keras: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in keras.items() if name.startswith(prefix)}


def in_keras_order(model: CosmoFlow) -> Iterator[tuple[str, nn.Parameter]]:
    for kind, layers in (("conv", model.convs), ("dense", model.denses)):
        for number, layer in enumerate(layers):
            yield f"{kind}{number}/kernel", layer.get_parameter("weight")
            yield f"{kind}{number}/bias", layer.get_parameter("bias")


def as_keras(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array = tensor.detach().numpy()
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def test_outputs_and_scores(keras: Arrays, batch: Batch) -> None:
    model = from_reference_weights(named(keras, "w/"))
    outputs = model(batch.volume).detach().numpy()
    np.testing.assert_allclose(outputs, keras["outputs"], rtol=0, atol=1e-5)
    assert np.square(outputs - keras["targets"]).mean() == pytest.approx(float(keras["mse"]), abs=1e-5)
    assert np.abs(outputs - keras["targets"]).mean() == pytest.approx(float(keras["mae"]), abs=1e-5)


def test_every_gradient(keras: Arrays, batch: Batch) -> None:
    model = from_reference_weights(named(keras, "w/"))
    loss = forward_backward(model, batch, "fp32")
    assert loss.item() == pytest.approx(float(keras["mse"]), abs=1e-5)
    gradients = named(keras, "g/")
    for name, parameter in in_keras_order(model):
        assert parameter.grad is not None
        expected = gradients.pop(name)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(as_keras(parameter.grad), expected, rtol=1e-4, atol=1e-4 * scale)
    assert not gradients


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_four_momentum_steps_with_changing_rates(
    implementation: Literal["fused", "foreach"], keras: Arrays, batch: Batch
) -> None:
    model = from_reference_weights(named(keras, "w/"))
    optimizer = build_optimizer(SGDConfig(momentum=0.9, implementation=implementation), model)
    for lr, expected in zip(keras["step_lrs"], keras["step_losses"], strict=True):
        set_lr(optimizer, float(lr))
        optimizer.zero_grad()
        assert forward_backward(model, batch, "fp32").item() == pytest.approx(float(expected), abs=1e-5)
        optimizer.step()
    after = named(keras, "after/")
    for name, parameter in in_keras_order(model):
        np.testing.assert_allclose(as_keras(parameter), after[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        model(batch.volume).detach().numpy(), keras["step_final_outputs"], rtol=0, atol=1e-5
    )


def test_without_the_rescaling_the_rule_is_another(keras: Arrays, batch: Batch) -> None:
    # The check above would be worth nothing if plain torch momentum passed it too.
    model = from_reference_weights(named(keras, "w/"))
    optimizer = build_optimizer(SGDConfig(momentum=0.9), model)
    for lr in keras["step_lrs"]:
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.zero_grad()
        forward_backward(model, batch, "fp32")
        optimizer.step()
    after = named(keras, "after/")
    worst = max(np.abs(as_keras(p) - after[name]).max() for name, p in in_keras_order(model))
    assert worst > 1e-4


def test_the_benchmark_network_has_the_published_size() -> None:
    model = CosmoFlow(ReferenceConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_907_556


def test_weights_that_do_not_fit_are_refused_by_name(keras: Arrays) -> None:
    whole = named(keras, "w/")
    spoiled = [
        ({name: value for name, value in whole.items() if name != "conv1/bias"}, "lack conv1/bias"),
        (whole | {"dense3/kernel": np.zeros((4, 4))}, "dense3/kernel"),
        (whole | {"conv1/kernel": np.zeros((3, 3, 3, 5, 8))}, "conv1/kernel"),
        (whole | {"dense0/kernel": np.zeros((1000, 16))}, "dense0/kernel"),
        ({}, "lack"),
    ]
    for weights, said in spoiled:
        with pytest.raises(UserError, match=said):
            from_reference_weights(weights)
