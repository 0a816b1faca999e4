"""Engines where no GPU is needed: their choice, a graph that cannot be captured, and the end of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from cosmoflow_dali.compute import engines
from cosmoflow_dali.compute.engines import ComputeConfig, GraphEngine
from cosmoflow_dali.compute.step import forward_backward
from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.errors import ConfigError
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


class FakeStream:
    def __init__(self, device: torch.device = CPU) -> None: ...

    def wait_stream(self, stream: FakeStream) -> None: ...


class FakeCuda:
    """Stands for torch.cuda: the bodies of captures run on the CPU, and the first `failures` of them fail."""

    CUDAGraph, Stream = FakeGraph, FakeStream

    def __init__(self, failures: int = 0) -> None:
        self.current, self.failures, self.captures = FakeStream(), failures, 0

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: FakeGraph, stream: FakeStream | None = None, **_: str) -> Iterator[None]:
        before, self.current = self.current, stream or FakeStream()
        yield
        self.captures += 1
        if self.captures <= self.failures:
            # As torch does, without restoring the stream.
            raise RuntimeError(
                "operation failed due to a previous error during capture\nSearch for cudaError"
            )
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeCuda]]:
    def install(failures: int = 0) -> FakeCuda:
        fake = FakeCuda(failures)
        for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
        return fake

    yield install
    engines._stream.cache_clear()


class Counting(CosmoFlow):
    """A network whose training changes a buffer."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__(config, seed=1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        self.get_buffer("count").add_(1)
        return super().forward(volume)


def make_graph(*, required: bool) -> tuple[GraphEngine, nn.Module, Batch]:
    model = Counting(ReferenceConfig(size=8, blocks=2, filters=4, dense=(8, 8), dropout=0.0))

    def batch(seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        volume = torch.rand(2, 8, 8, 8, 4, generator=generator).permute(0, 4, 1, 2, 3)
        return Batch(volume, torch.rand(2, 4, generator=generator), np.arange(2))

    inputs = batch(0)
    graph = GraphEngine(
        model, lambda batch: forward_backward(model, batch, "fp32"), inputs, required=required
    )
    return graph, model, batch(1)


def test_a_step_that_cannot_be_captured_is_launched_eagerly(
    cuda: Callable[..., FakeCuda], caplog: pytest.LogCaptureFixture
) -> None:
    fake = cuda(failures=1)
    stream = fake.current
    graph, model, batch = make_graph(required=False)
    with caplog.at_level(logging.WARNING, "cosmoflow_dali"):
        losses = [graph(batch).item() for _ in range(2)]
    # The second capture is one that succeeds, for the random numbers.
    assert fake.current is stream and fake.captures == 2
    # Neither the warm-up nor the failed capture has changed a buffer.
    assert model.get_buffer("count").item() == 2
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    assert losses == [forward_backward(model, batch, "fp32").item()] * 2
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(found, parameter.grad)
    # Said once.
    (line,) = caplog.messages
    assert "previous error" in line and "\n" not in line


def test_a_required_graph_that_cannot_be_captured_is_an_error(cuda: Callable[..., FakeCuda]) -> None:
    cuda(failures=1)
    graph, _, batch = make_graph(required=True)
    with pytest.raises(ConfigError, match="previous error") as error:
        graph(batch)
    assert error.value.key == "compute.engine" and "\n" not in str(error.value)


def test_over_several_ranks_a_graph_is_required(
    cuda: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda(failures=1)
    monkeypatch.setattr(engines, "DistributedDataParallel", Counting)
    graph, _, batch = make_graph(required=False)
    with pytest.raises(ConfigError, match="previous error") as error:
        graph(batch)
    assert error.value.key == "compute.engine" and "\n" not in str(error.value)


def test_a_step_that_fails_without_a_capture_is_an_error(cuda: Callable[..., FakeCuda]) -> None:
    cuda()
    graph, model, batch = make_graph(required=False)

    def fail_once(*_: object) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("out of memory")

    hook = model.register_forward_hook(fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        graph(batch)


def test_closing_frees_the_graph(cuda: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda()
    fake = FakeGraph()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: fake)
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
