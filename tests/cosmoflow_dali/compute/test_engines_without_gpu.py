"""Engines where no GPU is needed: their choice, a graph that cannot be captured, and the end of one."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from cosmoflow_dali.compute.engines import ComputeConfig, GraphEngine
from cosmoflow_dali.compute.step import forward_backward
from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.sample import Batch

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_auto_is_a_graph_on_a_gpu() -> None:
    assert ComputeConfig().engine_on(GPU) == "graph"
    assert ComputeConfig(nvtx=True).engine_on(GPU) == "eager"
    assert ComputeConfig().engine_on(CPU) == "eager"
    assert ComputeConfig(engine="eager").engine_on(GPU) == "eager"


class FakeGraph:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def replay(self) -> None:
        self.calls.append("replay")

    def reset(self) -> None:
        self.calls.append("reset")


def make_graph(*, required: bool) -> tuple[GraphEngine, nn.Module, Batch]:
    model = CosmoFlow(ReferenceConfig(size=8, blocks=2, filters=4, dense=(8, 8), dropout=0.0), seed=1)

    def batch(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        volume = torch.rand(2, 8, 8, 8, 4, generator=generator).permute(0, 4, 1, 2, 3)
        return Batch(volume, torch.rand(2, 4, generator=generator), np.arange(2))

    inputs = batch(0)
    graph = GraphEngine(
        model, lambda batch: forward_backward(model, batch, "fp32"), inputs, required=required
    )
    return graph, model, batch(1)


def cannot_capture(engine: GraphEngine) -> torch.cuda.CUDAGraph:
    raise RuntimeError("operation not permitted when stream is capturing\nSearch for cudaError")


def test_a_step_that_cannot_be_captured_is_launched_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(GraphEngine, "_capture", cannot_capture)
    graph, model, batch = make_graph(required=False)
    with caplog.at_level(logging.WARNING, "cosmoflow_dali"):
        losses = [graph(batch).item() for _ in range(2)]
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    assert losses == [forward_backward(model, batch, "fp32").item()] * 2
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(found, parameter.grad)
    # Said once.
    (line,) = caplog.messages
    assert "not permitted" in line and "\n" not in line


def test_a_required_graph_that_cannot_be_captured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphEngine, "_capture", cannot_capture)
    graph, _, batch = make_graph(required=True)
    with pytest.raises(RuntimeError):
        graph(batch)


def test_closing_frees_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGraph()
    monkeypatch.setattr(GraphEngine, "_capture", lambda engine: fake)
    graph, _, batch = make_graph(required=True)
    graph(batch)
    graph.close()
    graph.close()
    assert fake.calls == ["replay", "reset"]


def test_cudnn_searches_for_the_fastest_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    configure_torch(CPU, torch.get_num_threads())
    assert torch.backends.cudnn.benchmark
