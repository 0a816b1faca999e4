"""Engines where no GPU is needed: their choice, graphs on a fake GPU, and those that cannot be captured."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosmoflow_dali.compute import engines
from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.engines import Engine, GraphEngine
from cosmoflow_dali.compute.optim import (
    AdamConfig,
    SGDConfig,
    build_optimizer,
    capturable,
    restore_optimizer,
    set_lr,
)
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


class FakeGraph(TorchDispatchMode):
    """Records the operations of a capture, and repeats them on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a capture cannot wait for a number")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @property
    def names(self) -> set[str]:
        return {function.overloadpacket.__name__ for function, *_ in self.operations}

    def replay(self) -> None:
        self.calls.append("replay")
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, result in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and not function.is_view:
                        old.copy_(new)

    def reset(self) -> None:
        self.calls.append("reset")


class FakeStream:
    def __init__(self, device: torch.device = CPU) -> None: ...

    def wait_stream(self, stream: FakeStream) -> None: ...


class FakeCuda:
    """Stands for torch.cuda: the bodies of captures run on the CPU, and the first `failures` of them fail.

    A real capture executes nothing; `GraphEngine` restores what these bodies change.
    """

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
        with graph:
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


def make_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand(2, 8, 8, 8, 4, generator=generator).permute(0, 4, 1, 2, 3)
    return Batch(volume, torch.rand(2, 4, generator=generator), np.arange(2))


def build_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(SGDConfig(), model)


def make_graph(
    *,
    required: bool,
    build: Callable[[nn.Module], torch.optim.Optimizer] = build_sgd,
    scaler: torch.amp.GradScaler | None = None,
    eager: bool = False,
) -> tuple[Engine, Counting, torch.optim.Optimizer]:
    model = Counting(ReferenceConfig(size=8, blocks=2, filters=4, dense=(8, 8), dropout=0.0))
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    optimizer = build(model)

    def gradients(batch: Batch) -> torch.Tensor:
        return forward_backward(model, batch, "fp32", scaler)

    if eager:
        return Engine(model, optimizer, scaler, gradients), model, optimizer
    engine = GraphEngine(model, optimizer, scaler, gradients, make_batch(0), required=required)
    return engine, model, optimizer


RATES = 2**-7, 2**-7, 2**-6, 2**-9
"""Rates that single precision holds exactly."""


def train(engine: Engine, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    """Return the losses of `steps`, each with a rate and a batch of its own."""
    losses = []
    for step in steps:
        set_lr(optimizer, RATES[step])
        losses.append(engine(make_batch(step)).item())
    return losses


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize("config", [SGDConfig(weight_decay=0.02), AdamConfig()])
def test_a_graph_holds_the_whole_step_and_trains_as_eager_does(
    cuda: Callable[..., FakeCuda], caplog: pytest.LogCaptureFixture, config: SGDConfig | AdamConfig
) -> None:
    cuda()
    build = partial(build_optimizer, config)
    eager, plain, plain_optimizer = make_graph(required=True, build=build, eager=True)
    expected = train(eager, plain_optimizer, range(4))
    graph, model, optimizer = make_graph(required=True, build=build)
    with caplog.at_level(logging.INFO, "cosmoflow_dali"):
        losses = train(graph, optimizer, range(2))
        # A checkpoint between the steps, resumed by a process of its own.
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        resumed, after, its_optimizer = make_graph(required=True, build=build)
        after.load_state_dict(state[0])
        restore_optimizer(its_optimizer, state[1])
        assert losses + train(resumed, its_optimizer, (2, 3)) == expected
    train(graph, optimizer, (2, 3))
    for one in (model, after):
        assert torch.equal(flat(one), flat(plain))
    assert optimizer.state_dict()["param_groups"] == plain_optimizer.state_dict()["param_groups"]
    assert isinstance(graph, GraphEngine) and isinstance(graph._graph, FakeGraph)
    assert graph._graph.names >= {"_fused_adam_" if isinstance(config, AdamConfig) else "_fused_sgd_"}
    assert caplog.messages == []


def test_a_step_that_a_graph_cannot_hold_follows_it(
    cuda: Callable[..., FakeCuda], caplog: pytest.LogCaptureFixture
) -> None:
    cuda()

    def single(model: nn.Module) -> torch.optim.Optimizer:
        # Takes its rate from the host, as apex's does.
        return torch.optim.SGD(model.parameters(), momentum=0.9, fused=False)

    for build, scales, word in ((single, False, "SGD"), (build_sgd, True, "fp16")):
        states = []
        for eager in (True, False):
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scales)
            caplog.clear()
            with caplog.at_level(logging.INFO, "cosmoflow_dali"):
                engine, model, optimizer = make_graph(required=True, build=build, scaler=scaler, eager=eager)
                losses = train(engine, optimizer, range(4))
            states.append((flat(model), torch.tensor(losses), scaler.state_dict()))
        assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])
        assert states[0][2] == states[1][2]
        assert isinstance(engine, GraphEngine) and isinstance(engine._graph, FakeGraph)
        assert not any("sgd" in name for name in engine._graph.names)
        (line,) = caplog.messages
        assert word in line


def test_an_optimizer_that_reads_its_rate_on_the_host_would_break_the_capture() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.SGD([parameter], momentum=0.9, fused=False)
    with pytest.raises(RuntimeError, match="wait"), FakeGraph(), capturable(optimizer, torch.tensor(0.5)):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_step_that_cannot_be_captured_is_launched_eagerly(
    cuda: Callable[..., FakeCuda], caplog: pytest.LogCaptureFixture
) -> None:
    fake = cuda(failures=1)
    stream = fake.current
    graph, model, optimizer = make_graph(required=False)
    eager, plain, plain_optimizer = make_graph(required=False, eager=True)
    with caplog.at_level(logging.WARNING, "cosmoflow_dali"):
        losses = train(graph, optimizer, range(2))
    # The second capture is one that succeeds, for the random numbers.
    assert fake.current is stream and fake.captures == 2
    # Neither the warm-up nor the failed capture has changed a buffer.
    assert model.get_buffer("count").item() == 2
    assert losses == train(eager, plain_optimizer, range(2)) and torch.equal(flat(model), flat(plain))
    # Said once.
    (line,) = caplog.messages
    assert "previous error" in line and "\n" not in line


def test_a_required_graph_that_cannot_be_captured_is_an_error(cuda: Callable[..., FakeCuda]) -> None:
    cuda(failures=1)
    graph, _, _ = make_graph(required=True)
    with pytest.raises(ConfigError, match="previous error") as error:
        graph(make_batch(1))
    assert error.value.key == "compute.engine" and "\n" not in str(error.value)


def test_over_several_ranks_a_graph_is_required(
    cuda: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda(failures=1)
    monkeypatch.setattr(engines, "DistributedDataParallel", Counting)
    graph, _, _ = make_graph(required=False)
    with pytest.raises(ConfigError, match="previous error") as error:
        graph(make_batch(1))
    assert error.value.key == "compute.engine" and "\n" not in str(error.value)


def test_a_step_that_fails_without_a_capture_is_an_error(cuda: Callable[..., FakeCuda]) -> None:
    cuda()
    graph, model, _ = make_graph(required=False)

    def fail_once(*_: object) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("out of memory")

    hook = model.register_forward_hook(fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        graph(make_batch(1))


def test_closing_frees_the_graph(cuda: Callable[..., FakeCuda], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda()
    fake = FakeGraph()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: fake)
    graph, _, _ = make_graph(required=True)
    graph(make_batch(1))
    graph.close()
    graph.close()
    assert fake.calls == ["replay", "reset"]


def test_cudnn_searches_for_the_fastest_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    configure_torch(CPU, torch.get_num_threads())
    assert torch.backends.cudnn.benchmark
