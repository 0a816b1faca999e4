"""The first block's Triton kernel against torch in float64, in Triton's interpreter without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from cosmoflow_dali.compute.step import configure_float32, forward_backward
from cosmoflow_dali.models.blocks import LEAK, plain_max_block
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from cosmoflow_dali.models.triton_block import first_block, supports
from pipelines.sample import Batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [((1, 2, 2, 2), 16), ((2, 4, 6, 8), 32), ((1, 8, 8, 8), 64), ((3, 2, 4, 10), 16)]
"""Shape of the volume, and number of filters."""

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Tolerances relative to the largest value: float32 sums of rounded products, and the result's rounding."""


@pytest.fixture(autouse=True)
def float32_is_ieee() -> None:
    configure_float32("fp32")


def inputs(shape: tuple[int, ...], filters: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(DEVICE)

    batch, *edges = shape
    volume = draw(batch, *edges, 4).permute(0, 4, 1, 2, 3)
    # Half of the voxels are empty, so maxima tie.
    volume = volume.clamp_min(0)
    return [volume, draw(filters, 4, 3, 3, 3).requires_grad_(), draw(filters).requires_grad_()]


# Triton's interpreter does not multiply bfloat16.
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("shape", "filters"), SHAPES)
def test_values_and_gradients_equal_torch(shape: tuple[int, ...], filters: int, dtype: torch.dtype) -> None:
    assert_equals_torch(shape, filters, dtype)


def test_backward_programs_loop_over_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight programs forward, and two backward with four rounds each.
    monkeypatch.setattr("cosmoflow_dali.models.triton_block._PROGRAMS", 2)
    assert_equals_torch((1, 16, 16, 16), 16, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("edge", [64, 128])
def test_volumes_of_benchmark_size(edge: int, dtype: torch.dtype) -> None:
    assert_equals_torch((1, edge, edge, edge), 32, dtype)


def assert_equals_torch(shape: tuple[int, ...], filters: int, dtype: torch.dtype) -> None:
    """Compare values and gradients of `first_block` with torch in float64."""
    volume, kernel, bias = inputs(shape, filters, dtype)
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in (volume, kernel, bias)]
    fused, truth = first_block(volume, kernel, bias), plain_max_block(*exact)
    assert fused.dtype == dtype and fused.is_contiguous(memory_format=torch.channels_last_3d)
    close = ROUNDING[dtype]
    torch.testing.assert_close(fused.double(), truth, rtol=close, atol=close * truth.abs().max().item())
    gradient = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    *_, chosen = fused.grad_fn.saved_tensors  # type: ignore[union-attr]
    found = torch.autograd.grad(fused, (kernel, bias), gradient)
    wanted = torch.autograd.grad(truth, exact[1:], gradient.double())
    for one, other in zip(found, wanted, strict=True):
        # Rounding may change the maximum and move the whole gradient of its cell.
        assert ((one.double() - other).norm() / other.norm()).item() < (1e-5 if close == 1e-5 else 0.1)
    for one, other in zip(found, gradients_of_choice(exact, chosen, gradient), strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() < close


def gradients_of_choice(
    exact: list[torch.Tensor], chosen: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the float64 gradients of kernel and bias for a given choice of maxima.

    Args:
        exact: Volume, kernel and bias in float64.
        chosen: Voxel of each cell, (B, D/2, H/2, W/2, C).
        gradient: Gradient of the result.
    """
    volume, kernel, bias = exact
    active = functional.leaky_relu(functional.conv3d(volume, kernel, bias, padding=1), LEAK)
    batch, filters, depth, height, width = gradient.shape
    cells = active.view(batch, filters, depth, 2, height, 2, width, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    which = chosen.permute(0, 4, 1, 2, 3).long()[..., None]
    picked = cells.reshape(*gradient.shape, 8).gather(-1, which)[..., 0]
    return torch.autograd.grad(picked, (kernel, bias), gradient.double())


def test_network_with_the_fused_block_has_the_same_gradients() -> None:
    shape = ReferenceConfig(size=8, blocks=2, filters=16, dense=(16, 8), dropout=0.0)
    plain, fused = (CosmoFlow(shape, seed=2).to(DEVICE) for _ in range(2))
    fused.blocks[0] = first_block
    generator = torch.Generator().manual_seed(4)
    volume = torch.rand(2, 8, 8, 8, 4, generator=generator).to(DEVICE).permute(0, 4, 1, 2, 3)
    batch = Batch(volume, torch.rand(2, 4, generator=generator).to(DEVICE), np.arange(2))
    losses = [forward_backward(model, batch, "fp32") for model in (plain, fused)]
    torch.testing.assert_close(*losses)
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(volume), plain.eval()(volume))


def test_first_of_equal_voxels_gets_the_gradient() -> None:
    volume = torch.zeros(1, 4, 2, 2, 2, device=DEVICE).to(memory_format=torch.channels_last_3d)
    kernel = torch.zeros(16, 4, 3, 3, 3, device=DEVICE, requires_grad=True)
    first_block(volume + 1, kernel, torch.ones(16, device=DEVICE)).sum().backward()
    assert kernel.grad is not None
    # Around the first voxel of the cell, the last two of each axis' three taps lie in the volume.
    expected = torch.zeros(3, 3, 3, device=DEVICE)
    expected[1:, 1:, 1:] = 1
    torch.testing.assert_close(kernel.grad[3, 2], expected)


def test_nan_is_propagated() -> None:
    volume, kernel, bias = inputs((1, 4, 4, 4), 16, torch.float32)
    volume = volume.clone()
    volume[0, 1, 2, 3, 0] = float("nan")
    found, truth = first_block(volume, kernel, bias), plain_max_block(volume, kernel, bias)
    assert torch.equal(found.isnan(), truth.isnan()) and found.isnan().any()


def test_supported_shapes() -> None:
    assert [filters for filters in (8, 12, 16, 32, 64, 128) if supports(filters, 16, 128)] == [16, 32, 64]
    # 244 padded volumes of 128^3 have fewer than 2^31 numbers, 245 more.
    assert supports(32, 244, 128) and not supports(32, 245, 128)
