"""The pooling kernel against torch, in Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cosmoflow_dali.models.blocks import LEAK, pool_then_activate
from cosmoflow_dali.models.triton_pool import pool, pool_block, supports

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [((1, 2, 2, 2), 16), ((2, 4, 6, 8), 32), ((3, 2, 4, 10), 64), ((1, 16, 16, 18), 16)]
"""Batch and edges, and number of channels."""


def inputs(shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    # A coarse grid, so that maxima tie.
    values = torch.randint(-4, 5, (*shape, channels), generator=generator).to(dtype) / 4
    bias = torch.randn(channels, generator=generator).to(dtype)
    return values.to(DEVICE).permute(0, 4, 1, 2, 3).requires_grad_(), bias.to(DEVICE).requires_grad_()


def by_torch(values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    shifted = functional.max_pool3d(values, 2) + bias[:, None, None, None]
    return functional.leaky_relu(shifted, LEAK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_equals_torch(shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> None:
    values, bias = inputs(shape, channels, dtype)
    found, expected = pool(values, bias), by_torch(values, bias)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    gradients = [torch.autograd.grad(result, (values, bias), gradient) for result in (found, expected)]
    (of_values, of_bias), (expected_of_values, _) = gradients
    # Triton's interpreter rounds to bfloat16 by truncation; on a GPU all dtypes agree to the last bit.
    exact = dtype != torch.bfloat16 or DEVICE == "cuda"
    close = 0.0 if exact else torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=close, atol=0)
    torch.testing.assert_close(of_values, expected_of_values, rtol=close, atol=0)
    # Sums of any order.
    wide = expected_of_values.double().sum((0, 2, 3, 4))
    error = (of_bias.double() - wide).norm() / wide.norm()
    assert error < {torch.float32: 1e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_nan_is_the_maximum() -> None:
    values, bias = inputs((1, 4, 4, 4), 16, torch.float32)
    with torch.no_grad():
        values[0, 3, 1, 2, 3] = values[0, 3, 0, 2, 2] = float("nan")
    results = [pool(values, bias), by_torch(values, bias)]
    found, expected = results
    assert found.isnan().sum() == 1 and torch.equal(found.isnan(), expected.isnan())
    # One of the two gets the gradient, the same as by torch.
    of_found, of_expected = (
        torch.autograd.grad(result, values, torch.ones_like(result))[0] for result in results
    )
    assert torch.equal(of_found != 0, of_expected != 0)


def test_block_has_the_gradients_of_torchs_block() -> None:
    generator = torch.Generator().manual_seed(2)
    volume, kernel, bias = (
        torch.randn(*size, generator=generator).to(DEVICE).requires_grad_()
        for size in ((2, 4, 4, 6, 8), (16, 4, 3, 3, 3), (16,))
    )
    results = [block(volume, kernel, bias) for block in (pool_block, pool_then_activate)]
    gradient = torch.randn_like(results[0])
    found, expected = (torch.autograd.grad(result, (volume, kernel, bias), gradient) for result in results)
    torch.testing.assert_close(results[0], results[1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_backward_programs_loop_over_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmoflow_dali.models.triton_pool._PROGRAMS", 2)
    test_equals_torch((1, 16, 16, 18), 16, torch.float32)


def test_supported_shapes() -> None:
    assert [filters for filters in (4, 8, 24, 32, 512, 2048) if supports(filters, 16, 8)] == [8, 32, 512]
    # 255 pooled volumes of 64^3 have fewer than 2^31 numbers, also behind the last round; 256 have 2^31.
    assert supports(32, 255, 128) and not supports(32, 256, 128)
    assert supports(32, 31, 256) and not supports(32, 32, 256)
