"""The engines that need a GPU, against the eager one on the same GPU."""

from __future__ import annotations

import importlib.util
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from cosmoflow_dali.engines import ComputeConfig, Engine, distribute, make_engine
from cosmoflow_dali.model import CosmoFlow, ReferenceConfig
from cosmoflow_dali.open_model import OpenConfig, OpenCosmoFlow
from cosmoflow_dali.optim import SGDConfig, build_optimizer, set_lr
from cosmoflow_dali.step import Precision, make_scaler, seed_step, settle_float32
from pipelines.sample import Batch, SampleSpec

pytestmark = pytest.mark.gpu
SIZE, BATCH = 32, 4
CLOSE = {"fp32": 1e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
"""How near the gradients of two runs of the same kernels are: cuDNN sums in no fixed order."""


def network(kind: str) -> nn.Module:
    if kind == "open":
        return OpenCosmoFlow(OpenConfig(size=SIZE), seed=1).cuda()
    shape = ReferenceConfig(size=SIZE, blocks=3, filters=16, dense=(32, 16), dropout=0.5)
    return CosmoFlow(shape, seed=1).cuda()


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        volume = torch.rand(BATCH, SIZE, SIZE, SIZE, 4, generator=generator).cuda().permute(0, 4, 1, 2, 3)
        target = torch.rand(BATCH, 4, generator=generator).cuda()
        made.append(Batch(volume, target, np.arange(BATCH)))
    return made


def engine(model: nn.Module, compute: ComputeConfig) -> tuple[Engine, torch.amp.GradScaler]:
    device = torch.device("cuda")
    settle_float32(compute.precision)
    scaler = make_scaler(compute.precision, device)
    parallel = distribute(model, compute, device, ranks=1)
    return make_engine(parallel, compute, scaler, SampleSpec(SIZE), BATCH, device), scaler


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["graph", "compile"])
def test_losses_and_gradients_are_the_eager_ones(
    name: Literal["graph", "compile"], precision: Precision, micro_batch: int | None
) -> None:
    found = []
    for each in ("eager", name):
        model = network("reference")
        compute = ComputeConfig(precision, each, micro_batch)
        gradients, scaler = engine(model, compute)
        steps = []
        for step, batch in enumerate(batches(3)):
            seed_step(7, 0, step, 0)
            loss = gradients(batch)
            flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            steps.append((loss.item(), flat.clone() / scaler.get_scale()))
        found.append(steps)
    for (one_loss, one), (other_loss, other) in zip(*found, strict=True):
        # Dropout is the same only where the engine draws as the eager one does.
        if name == "graph":
            assert other_loss == pytest.approx(one_loss, rel=CLOSE[precision])
            assert (other - one).norm() <= CLOSE[precision] * one.norm()
        else:
            assert other_loss == pytest.approx(one_loss, rel=0.5) and other.isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["reference", "open"])
def test_a_capture_leaves_all_but_gradients_as_it_was(kind: str, precision: Precision) -> None:
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
        states.append((model.state_dict(), scaler.state_dict(), torch.cuda.get_rng_state()))
    (one, one_scale, one_rng), (other, other_scale, other_rng) = states
    assert one_scale == other_scale and torch.equal(one_rng, other_rng)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4)


def test_the_next_batch_is_written_where_the_graph_reads() -> None:
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
def test_apex_follows_the_same_rule() -> None:
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
