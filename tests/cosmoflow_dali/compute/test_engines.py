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

from cosmoflow_dali.compute.engines import ComputeConfig, Engine, make_engine, wrap_model
from cosmoflow_dali.compute.kernels import choose_kernels, use_kernels
from cosmoflow_dali.compute.optim import SGDConfig, build_optimizer, set_lr
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


def engine(model: nn.Module, compute: ComputeConfig, ranks: int = 1) -> tuple[Engine, torch.amp.GradScaler]:
    device = torch.device("cuda")
    configure_float32(compute.precision)
    # The default scale overflows before it settles.
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=compute.precision == "fp16")
    names = choose_kernels(model, compute.kernels, compute.precision, BATCH, device)
    use_kernels(model, names, compute.precision, BATCH)
    parallel = wrap_model(model, compute, device, ranks=ranks)
    return make_engine(parallel, compute, scaler, SampleSpec(SIZE), BATCH, device), scaler


def three_steps(model: nn.Module, compute: ComputeConfig, ranks: int = 1) -> list[tuple[float, torch.Tensor]]:
    """Return the loss and all gradients of three batches, at the same weights."""
    gradients, scaler = engine(model, compute, ranks)
    steps = []
    for step, batch in enumerate(batches(3)):
        seed_step(7, 0, step, 0)
        loss = gradients(batch)
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        steps.append((loss.item(), flat.clone() / scaler.get_scale()))
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


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["reference", "open"])
def test_capture_changes_gradients_only(kind: str, precision: Precision) -> None:
    states = []
    for name in ("eager", "graph"):
        model = network(kind)
        gradients, scaler = engine(model, ComputeConfig(precision, name))
        optimizer = build_optimizer(SGDConfig(), model)
        for step, batch in enumerate(batches(4)):
            set_lr(optimizer, 0.01)
            seed_step(7, 0, step, 0)
            gradients(batch)
            scaler.step(optimizer)
            scaler.update()
        momentum = {str(at): optimizer.state[p]["momentum_buffer"] for at, p in enumerate(model.parameters())}
        states.append((model.state_dict() | momentum, scaler.state_dict(), torch.cuda.get_rng_state()))
    (one, one_scale, one_rng), (other, other_scale, other_rng) = states
    assert one_scale == other_scale and torch.equal(one_rng, other_rng)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4)


def test_graph_reads_its_static_inputs() -> None:
    model = network("reference").eval()
    gradients, _ = engine(model, ComputeConfig("bf16", "graph"))
    inputs = gradients.inputs
    assert inputs is not None and inputs.volume.dtype == torch.bfloat16
    losses = []
    for batch in batches(2):
        inputs.volume.copy_(batch.volume)
        inputs.target.copy_(batch.target)
        losses.append(gradients(inputs))
    assert losses[0].item() != losses[1].item()


@pytest.mark.skipif(importlib.util.find_spec("amp_C") is None, reason="NVIDIA's apex is not installed")
def test_apex_equals_fused() -> None:
    weights = []
    for implementation in ("apex", "fused"):
        model = network("open")
        gradients, _ = engine(model, ComputeConfig("fp32", "eager"))
        optimizer = build_optimizer(SGDConfig(implementation=implementation), model)
        for batch, lr in zip(batches(4), (0.01, 0.02, 0.005, 0.005), strict=True):
            set_lr(optimizer, lr)
            gradients(batch)
            optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
