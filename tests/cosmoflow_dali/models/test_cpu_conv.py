"""Convolution by pairs of voxels, against torch's own convolution and its autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from cosmoflow_dali.models import cpu_conv as convolution
from cosmoflow_dali.models.cpu_conv import conv3d, conv3d_backward


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("width", [4, 5, 8])
@pytest.mark.parametrize(("channels", "filters"), [(4, 8), (8, 16), (4, 4), (3, 5), (16, 32)])
def test_it_is_torch_s_convolution_with_torch_s_gradients(
    lanes: int, padding: int, width: int, channels: int, filters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "LANES", lanes)
    random = torch.Generator().manual_seed(width)
    shapes = [(2, channels, 6, 4, width), (filters, channels, 3, 3, 3), (filters,)]
    given = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    given = [each.requires_grad_() for each in given]
    expected = functional.conv3d(given[0], given[1], given[2], padding=padding)
    gradient = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, given, gradient)

    with torch.no_grad():
        volume, kernel, bias = given
        torch.testing.assert_close(conv3d(volume, kernel, bias, padding=padding), expected)
        unbiased = functional.conv3d(volume, kernel, padding=padding)
        torch.testing.assert_close(conv3d(volume, kernel, None, padding=padding), unbiased)
        for_all = conv3d_backward(gradient, volume, kernel, padding=padding, wanted=[True] * 3)
        for own, of_torch in zip(for_all, wanted, strict=True):
            torch.testing.assert_close(own, of_torch)
        no_volume, grad_weight, no_bias = conv3d_backward(
            gradient, volume, kernel, padding=padding, wanted=[False, True, False]
        )
    assert no_volume is None and no_bias is None
    torch.testing.assert_close(grad_weight, wanted[1])


@pytest.mark.parametrize("filters", [4, 8])
def test_half_precision_is_as_near_by_pairs(filters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "LANES", 16)
    random = torch.Generator().manual_seed(3)
    shapes = [(2, 4, 8, 8, 8), (filters, 4, 3, 3, 3), (filters,)]
    given = [torch.randn(shape, generator=random).bfloat16() for shape in shapes]
    exact = [each.double().requires_grad_() for each in given]
    expected = functional.conv3d(exact[0], exact[1], exact[2], padding=1)
    gradient = torch.randn(expected.shape, generator=random).bfloat16()
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    found = conv3d(given[0], given[1], given[2], padding=1)
    back = conv3d_backward(gradient, given[0], given[1], padding=1, wanted=[True] * 3)
    for own, true in zip([found, *back], [expected, *wanted], strict=True):
        assert own is not None and own.dtype == torch.bfloat16
        # Rounded to 8 bits once, or where two halves are added up twice.
        assert (own.double() - true).norm() < 2**-8 * true.norm()


@pytest.mark.parametrize(("filters", "lanes", "stride"), [(8, 16, (1, 1, 2)), (16, 16, 1), (8, 8, 1)])
def test_pairs_are_made_where_they_fill_a_register(
    filters: int, lanes: int, stride: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "LANES", lanes)
    torch_conv3d, strides = functional.conv3d, []

    def seen(volume: Any, kernel: Any, bias: Any, stride: Any = 1, padding: Any = 0) -> torch.Tensor:
        strides.append(stride)
        return torch_conv3d(volume, kernel, bias, stride, padding)

    monkeypatch.setattr(functional, "conv3d", seen)
    conv3d(torch.zeros(1, 4, 4, 4, 4), torch.zeros(filters, 4, 3, 3, 3), None, padding=1)
    assert strides == [stride]
