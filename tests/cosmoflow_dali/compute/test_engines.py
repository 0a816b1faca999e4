"""The GPU engines, against the eager one on the same GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.engines import Engine, make_engine, wrap_model
from cosmoflow_dali.compute.kernels import choose_kernels, use_kernels
from cosmoflow_dali.compute.optim import AdamConfig, SGDConfig, build_optimizer, set_lr
from cosmoflow_dali.compute.step import Precision, configure_float32, seed_step
from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.sample import Batch, SampleSpec

pytestmark = pytest.mark.gpu
SIZE, BATCH = 32, 4
CLOSE = {"fp32": 1e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
"""Tolerances of gradients of two runs of the same kernels: cuDNN sums in no fixed order."""


def network(kind: str, dropout: float = 0.5) -> nn.Module:
    if kind == "open":
        return OpenCosmoFlow(OpenConfig(size=SIZE), seed=1).cuda()
    shape = ReferenceConfig(size=SIZE, blocks=3, filters=16, dense=(32, 16), dropout=dropout)
    return CosmoFlow(shape, seed=1).cuda()


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        volume = torch.rand(BATCH, SIZE, SIZE, SIZE, 4, generator=generator).cuda().permute(0, 4, 1, 2, 3)
        target = torch.rand(BATCH, 4, generator=generator).cuda()
        made.append(Batch(volume, target, np.arange(BATCH)))
    return made


def engine(
    model: nn.Module, compute: ComputeConfig, optimizer: torch.optim.Optimizer, ranks: int = 1
) -> tuple[Engine, torch.amp.GradScaler]:
    device = torch.device("cuda")
    configure_float32(compute.precision)
    # The default scale overflows before it settles.
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=compute.precision == "fp16")
    names = choose_kernels(model, compute.kernels, compute.precision, BATCH, device)
    use_kernels(model, names, compute.precision, BATCH)
    parallel = wrap_model(model, compute, device, ranks=ranks)
    return make_engine(parallel, compute, optimizer, scaler, (BATCH, *SampleSpec(SIZE).shape), device), scaler


def three_steps(model: nn.Module, compute: ComputeConfig, ranks: int = 1) -> list[tuple[float, torch.Tensor]]:
    """Return the loss and all gradients of three batches, at the same weights."""
    # A rate of 0 keeps the weights, and the optimizer divides the gradients by the scale.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    run, _ = engine(model, compute, optimizer, ranks)
    steps = []
    for step, batch in enumerate(batches(3)):
        seed_step(7, 0, step, 0)
        loss = run(batch)
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        steps.append((loss.item(), flat.clone()))
    return steps


def assert_near(
    found: list[tuple[float, torch.Tensor]], expected: list[tuple[float, torch.Tensor]], close: float
) -> None:
    for (loss, gradient), (expected_loss, expected_gradient) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=close)
        assert (gradient - expected_gradient).norm() <= close * expected_gradient.norm()


@pytest.mark.parametrize(
    ("precision", "micro_batch"),
    [("fp32", None), ("tf32", None), ("fp16", None), ("bf16", None), ("fp32", 2)],
)
def test_graph_has_the_losses_and_gradients_of_eager(precision: Precision, micro_batch: int | None) -> None:
    eager, graph = (
        three_steps(network("reference"), ComputeConfig(precision, name, micro_batch))
        for name in ("eager", "graph")
    )
    assert_near(graph, eager, CLOSE[precision])


@pytest.mark.parametrize("name", ["eager", "graph", "compile"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_triton_works_with_every_engine(
    precision: Precision, name: Literal["eager", "graph", "compile"]
) -> None:
    plain, fused = (
        three_steps(network("reference", dropout=0.0), compute)
        for compute in (
            ComputeConfig(precision, "eager", kernels="torch"),
            ComputeConfig(precision, name, kernels="triton"),
        )
    )
    # In half precision, rounding changes some maxima.
    assert_near(fused, plain, {"fp32": 1e-4, "tf32": 2e-2}.get(precision, 0.1))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_has_the_losses_and_gradients_of_eager(precision: Precision) -> None:
    # Without dropout, which it draws differently.
    eager, compiled = (
        three_steps(network("reference", dropout=0.0), ComputeConfig(precision, name))
        for name in ("eager", "compile")
    )
    # It may choose other kernels for convolutions.
    assert_near(compiled, eager, max(CLOSE[precision], 1e-4))


@pytest.mark.parametrize("exchange", ["fp32", "bf16"])
def test_graph_includes_the_allreduce(exchange: Literal["fp32", "bf16"], tmp_path: Path) -> None:
    eager = three_steps(network("reference"), ComputeConfig("fp32", "eager"))
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compute = ComputeConfig("fp32", "graph", exchange=exchange)
        # One rank, treated as several.
        graph = three_steps(network("reference"), compute, ranks=2)
    finally:
        dist.destroy_process_group()
    assert_near(graph, eager, 1e-5 if exchange == "fp32" else 1e-2)


@pytest.mark.parametrize("config", [SGDConfig(weight_decay=0.02), AdamConfig()])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["reference", "open"])
def test_graph_trains_as_eager_does(
    kind: str,
    precision: Precision,
    config: SGDConfig | AdamConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Adam moves a weight by its rate, whatever the sign of a gradient that is rounding alone.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    if kind == "open" and isinstance(config, SGDConfig):
        config = SGDConfig()
    states = []
    for name in ("eager", "graph"):
        model = network(kind, dropout=0.0)
        optimizer = build_optimizer(config, model, precision, name)
        with caplog.at_level("INFO", "cosmoflow_dali"):
            run, scaler = engine(model, ComputeConfig(precision, name, kernels="torch"), optimizer)
        # Single precision, in which a graph reads them, holds these rates exactly.
        for step, (batch, rate) in enumerate(zip(batches(4), (2**-7, 2**-7, 2**-6, 2**-8), strict=True)):
            set_lr(optimizer, rate)
            seed_step(7, 0, step, 0)
            run(batch)
        state = {
            f"{at} {key}": value
            for at, parameter in enumerate(model.parameters())
            for key, value in optimizer.state[parameter].items()
        }
        assert all(group["lr"] == 2**-8 for group in optimizer.param_groups)
        states.append((model.state_dict() | state, scaler.state_dict(), torch.cuda.get_rng_state()))
    # fp16's scaler stays outside of the graph.
    assert any("update" in line for line in caplog.messages) == (precision == "fp16")
    (one, one_scale, one_rng), (other, other_scale, other_rng) = states
    assert one_scale == other_scale and torch.equal(one_rng, other_rng)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4)


def test_graph_reads_its_static_inputs() -> None:
    model = network("reference").eval()
    run, _ = engine(model, ComputeConfig("bf16", "graph"), build_optimizer(SGDConfig(), model))
    inputs = run.inputs
    assert inputs is not None and inputs.volume.dtype == torch.bfloat16
    losses = []
    for batch in batches(2):
        inputs.volume.copy_(batch.volume)
        inputs.target.copy_(batch.target)
        losses.append(run(inputs))
    assert losses[0].item() != losses[1].item()


@pytest.mark.skipif(importlib.util.find_spec("amp_C") is None, reason="NVIDIA's apex is not installed")
def test_apex_equals_fused() -> None:
    weights = []
    for implementation in ("apex", "fused"):
        model = network("open")
        optimizer = build_optimizer(SGDConfig(implementation=implementation), model)
        run, _ = engine(model, ComputeConfig("fp32", "eager"), optimizer)
        for batch, lr in zip(batches(4), (0.01, 0.02, 0.005, 0.005), strict=True):
            set_lr(optimizer, lr)
            run(batch)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
