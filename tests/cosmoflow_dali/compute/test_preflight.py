"""The check of convolutions: known faults by version, and a convolution that is wrong."""

from __future__ import annotations

import logging

import pytest
import torch

from cosmoflow_dali.compute import kernels, preflight
from cosmoflow_dali.compute.kernels import Shape, choose
from cosmoflow_dali.compute.preflight import check_convolutions, known_fault
from cosmoflow_dali.compute.step import Precision
from cosmoflow_dali.models.blocks import pool_then_activate
from pipelines.errors import ConfigError, UserError

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("precision", "torch_version", "cudnn", "issue"),
    [
        ("bf16", "2.13.0+cu130", 92000, None),
        ("bf16", "2.9.1+cu128", 91501, None),
        ("bf16", "2.10.0a0+b4e4ee81d3.nv25.12", 91700, None),
        ("bf16", "2.8.0", 90701, None),
        ("fp32", "2.9.0", 91002, None),
        ("bf16", "2.9.0+cu128", 91002, "166643"),
        ("fp16", "2.9.0", 92100, "166643"),
        ("bf16", "2.9.1+cu128", 91002, "166643"),
        ("bf16", "2.8.0+cu128", 91002, "163539"),
        ("fp16", "2.7.1", 90800, "163539"),
    ],
)
def test_slow_and_doubtful_versions_are_named(
    precision: Precision, torch_version: str, cudnn: int, issue: str | None
) -> None:
    fault = known_fault(precision, torch_version, cudnn)
    assert (fault is None) == (issue is None)
    assert issue is None or (issue in str(fault) and "\n" not in str(fault))


def test_wrong_versions_are_refused() -> None:
    for cudnn in (91002, 91300, 91500):
        with pytest.raises(ConfigError) as error:
            known_fault("tf32", "2.9.1", cudnn)
        assert error.value.key == "compute.precision"
    for cudnn in (90100, 91001, 91501, 92000):
        assert known_fault("tf32", "2.9.1", cudnn) is None


@pytest.fixture
def gpu_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check as on a GPU, by a convolution on the CPU, with versions that have no known fault."""
    monkeypatch.setattr(
        preflight,
        "choose",
        lambda title, blocks, shape, precision, device, seconds: choose(
            title, blocks, shape, precision, torch.device("cpu"), seconds
        ),
    )
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)


@pytest.mark.usefixtures("gpu_on_the_cpu")
def test_a_wrong_convolution_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("fp32", "bf16"):
        check_convolutions(precision, GPU)

    def wrong(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return pool_then_activate(volume, kernel.roll(1, 2), bias)

    monkeypatch.setattr(preflight, "pool_then_activate", wrong)
    with pytest.raises(UserError, match="bf16"):
        check_convolutions("bf16", GPU)


@pytest.mark.usefixtures("gpu_on_the_cpu")
def test_a_slow_version_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.0+cu128")
    with caplog.at_level(logging.WARNING, "cosmoflow_dali"):
        check_convolutions("bf16", GPU)
        check_convolutions("bf16", torch.device("cpu"))
    assert len(caplog.messages) == 1


def slow_convolutions(shape: Shape, precision: Precision, device: torch.device) -> set[str]:
    """Return what a block's forward and backward pass runs in place of cuDNN's or oneDNN's convolutions."""
    inputs, gradient = kernels._problem(shape, precision, device)
    with torch.profiler.profile() as trace:
        kernels._solve(pool_then_activate, inputs, gradient, precision)
    names = {event.key for event in trace.key_averages()}
    assert any("conv" in name for name in names)
    return {name for name in names if "slow_conv" in name or "vol2col" in name}


def test_the_profiler_finds_slow_convolutions() -> None:
    # On a CPU torch leaves a single sample to its own convolution.
    shape, cpu = Shape(2, 16, 32, 8), torch.device("cpu")
    assert slow_convolutions(shape, "fp32", cpu) == set()
    assert slow_convolutions(shape._replace(batch=1), "fp32", cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cudnn_computes_all_convolutions(precision: Precision) -> None:
    for block in range(5):
        shape = Shape(1, 4 if block == 0 else 16 << block, 32 << block, 128 >> block)
        assert slow_convolutions(shape, precision, GPU) == set()
