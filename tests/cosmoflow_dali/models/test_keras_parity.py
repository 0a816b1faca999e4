"""The reference network against Keras: outputs, gradients, and SGD with changing learning rates.

tests/data/keras_small.npz was written by TensorFlow 2.15: the network at 32^3 with three blocks of
four filters and dense layers of 16 and 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.engines import make_engine
from cosmoflow_dali.compute.optim import SGDConfig, build_optimizer, set_lr
from cosmoflow_dali.compute.step import Precision, autocast, configure_float32, forward_backward
from cosmoflow_dali.models.keras_weights import from_reference_weights
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.errors import UserError
from pipelines.sample import Batch, SampleSpec

Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def keras() -> Arrays:
    with np.load(Path(__file__).parents[2] / "data" / "keras_small.npz") as archive:
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
    array = tensor.detach().cpu().numpy()
    return np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array


def test_outputs_and_scores_match_keras(keras: Arrays, batch: Batch) -> None:
    model = from_reference_weights(named(keras, "w/"))
    outputs = model(batch.volume).detach().numpy()
    np.testing.assert_allclose(outputs, keras["outputs"], rtol=0, atol=1e-5)
    assert np.square(outputs - keras["targets"]).mean() == pytest.approx(float(keras["mse"]), abs=1e-5)
    assert np.abs(outputs - keras["targets"]).mean() == pytest.approx(float(keras["mae"]), abs=1e-5)


def test_gradients_match_keras(keras: Arrays, batch: Batch) -> None:
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


def test_momentum_steps_with_changing_rates_match_keras(keras: Arrays, batch: Batch) -> None:
    model = from_reference_weights(named(keras, "w/"))
    optimizer = build_optimizer(SGDConfig(momentum=0.9), model)
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


CLOSE: dict[Precision, tuple[float, float]] = {
    "fp32": (1e-5, 1e-5),
    "tf32": (1e-5, 1e-5),
    "fp16": (3e-3, 0.06),
    "bf16": (2e-2, 0.2),
}
"""Tolerances of outputs and losses, and, relative to their norm, of gradients and the changes of four steps.

Outputs and losses are near 1 and pass through six layers' roundings, of 2^-11 in fp16 and 2^-8 in bf16.
Rounding also creates near-ties in max pooling, which share a gradient that Keras passes to one voxel.
"""

ON_GPU = (5e-3, 0.06)
"""Minimum tolerances on a GPU, where pooling chooses one of near-ties and tf32 rounds."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("cpu", "eager"),
        pytest.param("cpu", "compile", marks=pytest.mark.slow),
        *(pytest.param("cuda", each, marks=pytest.mark.gpu) for each in ("eager", "graph", "compile")),
    ],
)
def test_engines_and_precisions_match_keras(
    kind: str, engine: Literal["eager", "graph", "compile"], precision: Precision, keras: Arrays, batch: Batch
) -> None:
    device = torch.device(kind)
    configure_float32(precision)
    model = from_reference_weights(named(keras, "w/")).to(device)
    given = replace(batch, volume=batch.volume.to(device), target=batch.target.to(device))
    values, changes = np.maximum(CLOSE[precision], ON_GPU if kind == "cuda" else 0)
    with autocast(precision, device):
        outputs = model(given.volume).detach().float().cpu().numpy()
    np.testing.assert_allclose(outputs, keras["outputs"], rtol=0, atol=values)
    # The configuration allows compile on GPUs only.
    compiled = torch.compile(model) if engine == "compile" else model
    compute = ComputeConfig(precision, "eager" if engine == "compile" else engine)
    scaler = torch.amp.GradScaler(kind, init_scale=1024.0, enabled=precision == "fp16")
    optimizer = build_optimizer(SGDConfig(momentum=0.9), model)
    step = make_engine(compiled, compute, optimizer, scaler, (2, *SampleSpec(32).shape), device)  # type: ignore[arg-type]
    losses = []
    for lr in keras["step_lrs"]:
        set_lr(optimizer, float(lr))
        losses.append(step(given).item())
        if len(losses) == 1:
            # The optimizer has divided them by the scale.
            found = {name: as_keras(p.grad) for name, p in in_keras_order(model)}  # type: ignore[arg-type]
            assert distance(found, named(keras, "g/")) <= changes
    np.testing.assert_allclose(losses, keras["step_losses"], rtol=0, atol=values)
    before = named(keras, "w/")
    found = {name: as_keras(parameter) - before[name] for name, parameter in in_keras_order(model)}
    assert (
        distance(found, {name: value - before[name] for name, value in named(keras, "after/").items()})
        <= changes
    )


def distance(found: Arrays, expected: Arrays) -> float:
    """Return the norm of all differences relative to that of the expected values."""
    one, other = (np.concatenate([each[name].ravel() for name in expected]) for each in (found, expected))
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_momentum_without_rescaling_differs_from_keras(keras: Arrays, batch: Batch) -> None:
    # The test of momentum steps would prove nothing if torch's momentum passed it too.
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


def test_benchmark_network_has_the_published_size() -> None:
    model = CosmoFlow(ReferenceConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_907_556


def test_unsuitable_weights_are_refused_by_name(keras: Arrays) -> None:
    whole = named(keras, "w/")
    unsuitable = [
        ({name: value for name, value in whole.items() if name != "conv1/bias"}, "conv1/bias"),
        (whole | {"dense3/kernel": np.zeros((4, 4))}, "dense3/kernel"),
        (whole | {"conv1/kernel": np.zeros((3, 3, 3, 5, 8))}, "conv1/kernel"),
        (whole | {"dense0/kernel": np.zeros((1000, 16))}, "dense0/kernel"),
        ({}, "conv0/kernel"),
    ]
    for weights, name in unsuitable:
        with pytest.raises(UserError, match=name):
            from_reference_weights(weights)
