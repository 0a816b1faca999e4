"""The optimizers: Keras's momentum rule, skipped steps, restored states, and the choice of implementation."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cosmoflow_dali.compute import optim
from cosmoflow_dali.compute.optim import (
    AdamConfig,
    SGDConfig,
    build_optimizer,
    capturable,
    describe,
    restore_optimizer,
    set_lr,
)
from cosmoflow_dali.compute.step import forward_backward
from cosmoflow_dali.config import resolve
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.errors import ConfigError
from pipelines.sample import Batch

CPU = torch.device("cpu")


def network() -> CosmoFlow:
    return CosmoFlow(ReferenceConfig(size=16, blocks=3, filters=4, dense=(16, 8), dropout=0.0), seed=1)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    volume = torch.rand(2, 16, 16, 16, 4, generator=generator).permute(0, 4, 1, 2, 3)
    return Batch(volume, torch.rand(2, 4, generator=generator), np.arange(2))


def test_step_that_the_scaler_skips_has_no_effect() -> None:
    # Compared with a run without that step. torch's fused SGD goes wrong at the first step.
    for overflows in (0, 2):
        weights = []
        for includes_it in (True, False):
            model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=8.0, backoff_factor=0.999999)
            optimizer = build_optimizer(SGDConfig(), model)
            for step in range(4):
                if step == overflows and not includes_it:
                    continue
                set_lr(optimizer, 0.01)
                optimizer.zero_grad()
                forward_backward(model, batch(), "fp32", scaler)
                if step == overflows:
                    model.convs[0].get_parameter("weight").grad[0, 0] = float("inf")  # type: ignore[index]
                scaler.step(optimizer)
                scaler.update()
            weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert weights[0].isfinite().all()
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_momentum_follows_keras_through_rates_of_0() -> None:
    model = network()
    optimizer = build_optimizer(SGDConfig(momentum=0.9), model)
    parameter = model.denses[0].get_parameter("weight")
    generator = np.random.default_rng(2)
    velocity, expected = np.zeros(parameter.shape), parameter.detach().numpy().astype(np.float64)
    for rate in (0.0, 0.0, 0.01, 0.02, 0.0, 0.0, 0.005, 0.005):
        gradient = generator.standard_normal(parameter.shape).astype(np.float32)
        set_lr(optimizer, rate)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        # Keras's rule.
        velocity = 0.9 * velocity - rate * gradient
        expected = expected + velocity
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [SGDConfig(weight_decay=0.02), AdamConfig()])
def test_rates_on_the_device_give_the_same_bits(config: SGDConfig | AdamConfig) -> None:
    weights, states = [], []
    for on_device in (False, True):
        model = network()
        optimizer, lr = build_optimizer(config, model), torch.zeros(())
        # Single precision holds them exactly.
        for rate in (2**-7, 2**-7, 2**-6, 2**-9, 3 * 2**-9):
            set_lr(optimizer, rate)
            lr.fill_(rate)
            optimizer.zero_grad()
            forward_backward(model, batch(), "fp32")
            with capturable(optimizer, lr) if on_device else nullcontext():
                optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        states.append(optimizer.state_dict())
    assert torch.equal(*weights)
    # A checkpoint does not tell them apart.
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert isinstance(states[1]["param_groups"][0]["lr"], float)
    for one, two in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_state_of_another_implementation_is_restored() -> None:
    models, optimizers = (network(), network()), []
    for model in models:
        optimizers.append(build_optimizer(SGDConfig(), model))
        set_lr(optimizers[-1], 0.01)
        forward_backward(model, batch(), "fp32")
        optimizers[-1].step()
    # As a checkpoint of the removed implementation has it.
    state = copy.deepcopy(optimizers[1].state_dict())
    for group in state["param_groups"]:
        group |= {"fused": False, "foreach": True}
    other = build_optimizer(SGDConfig(), models[1])
    restore_optimizer(other, state)
    assert other.param_groups[0]["fused"] and not other.param_groups[0]["foreach"]
    for optimizer in (optimizers[0], other):
        set_lr(optimizer, 0.02)
        optimizer.step()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two)


def test_configuration_with_the_removed_foreach_uses_fused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "cosmoflow_dali"):
        config = resolve({"optimizer": {"implementation": "foreach"}})
    assert isinstance(config.optimizer, SGDConfig) and config.optimizer.implementation == "fused"
    assert "optimizer.implementation" in caplog.text


def test_apex_is_refused_or_replaced_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as error:
        build_optimizer(SGDConfig(implementation="apex"), network())
    assert error.value.key == "optimizer.implementation"
    gpu = torch.device("cuda")
    assert "(apex is not installed" in describe(build_optimizer(SGDConfig(), network()), SGDConfig(), gpu)
    # `pip install apex` installs an unrelated package of that name.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    optimizer = build_optimizer(SGDConfig(), network())
    text = describe(optimizer, SGDConfig(), gpu)
    sys.modules.pop("apex", None)
    assert text.startswith("torch fused SGD (") and "not NVIDIA's" in text
    for config, device in ((SGDConfig(), CPU), (SGDConfig(implementation="fused"), gpu), (AdamConfig(), gpu)):
        assert describe(optimizer, config, device) == "torch fused SGD"


def test_neither_fp16_nor_a_graph_uses_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = SimpleNamespace(FusedSGD=torch.optim.SGD)
    monkeypatch.setattr(importlib, "import_module", lambda name: found)
    gpu = torch.device("cuda", 0)
    fused, reason = optim._apex_sgd(gpu, "bf16", "eager")
    assert fused is torch.optim.SGD and not reason
    for precision, engine, word in (("fp16", "eager", "fp16"), ("bf16", "graph", "CUDA graph")):
        fused, reason = optim._apex_sgd(gpu, precision, engine)  # type: ignore[arg-type]
        assert fused is None and word in reason
