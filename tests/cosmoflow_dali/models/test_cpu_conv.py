"""Convolution by pairs of voxels, against torch's convolution and autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional

from cosmoflow_dali.models import cpu_conv
from cosmoflow_dali.models.cpu_conv import conv3d, conv3d_backward

CHANNELS_AND_FILTERS = (4, 8), (8, 16), (4, 4), (3, 5), (16, 32)


def arguments(width: int, channels: int, filters: int) -> list[torch.Tensor]:
    """Return a volume, weights and a bias in float64."""
    random = torch.Generator().manual_seed(width)
    shapes = [(2, channels, 6, 4, width), (filters, channels, 3, 3, 3), (filters,)]
    return [torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("padding", [(0, 0, 0), (1, 1, 1), (0, 1, 1)])
def test_convolution_and_gradients_equal_torch(
    lanes: int, padding: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_conv, "LANES", lanes)
    for width, (channels, filters) in itertools.product((4, 5, 8), CHANNELS_AND_FILTERS):
        volume, weight, bias = inputs = arguments(width, channels, filters)
        expected = functional.conv3d(volume, weight, bias, padding=padding)
        grad_output = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
        expected_gradients = torch.autograd.grad(expected, inputs, grad_output)

        with torch.no_grad():
            torch.testing.assert_close(conv3d(volume, weight, bias, padding=padding), expected)
            unbiased = functional.conv3d(volume, weight, padding=padding)
            torch.testing.assert_close(conv3d(volume, weight, None, padding=padding), unbiased)
            found = conv3d_backward(grad_output, volume, weight, padding=padding, output_mask=[True] * 3)
            for one, other in zip(found, expected_gradients, strict=True):
                torch.testing.assert_close(one, other)
            mask = [False, True, False]
            grad_input, grad_weight, grad_bias = conv3d_backward(
                grad_output, volume, weight, padding=padding, output_mask=mask
            )
        assert grad_input is None and grad_bias is None
        torch.testing.assert_close(grad_weight, expected_gradients[1])


@pytest.mark.parametrize("filters", [4, 8])
def test_half_precision_pairs_are_as_accurate(filters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_conv, "LANES", 16)
    inputs = [each.detach().bfloat16() for each in arguments(8, 4, filters)]
    exact = [each.double().requires_grad_() for each in inputs]
    expected = functional.conv3d(exact[0], exact[1], exact[2], padding=1)
    grad_output = torch.linspace(-1, 1, expected.numel()).view_as(expected).bfloat16()
    expected_gradients = torch.autograd.grad(expected, exact, grad_output.double())
    output = conv3d(inputs[0], inputs[1], inputs[2], padding=(1, 1, 1))
    found = conv3d_backward(grad_output, inputs[0], inputs[1], padding=(1, 1, 1), output_mask=[True] * 3)
    for one, other in zip([output, *found], [expected, *expected_gradients], strict=True):
        assert one is not None and one.dtype == torch.bfloat16
        # Rounded to 8 bits once, or twice where two halves are added.
        assert (one.double() - other).norm() < 2**-8 * other.norm()


@pytest.mark.parametrize(("filters", "lanes", "stride"), [(8, 16, (1, 1, 2)), (16, 16, 1), (8, 8, 1)])
def test_pairs_are_used_where_they_fill_a_register(
    filters: int, lanes: int, stride: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_conv, "LANES", lanes)
    torch_conv3d, strides = functional.conv3d, []

    def record(volume: Any, weight: Any, bias: Any, stride: Any = 1, padding: Any = 0) -> torch.Tensor:
        strides.append(stride)
        return torch_conv3d(volume, weight, bias, stride, padding)

    monkeypatch.setattr(functional, "conv3d", record)
    conv3d(torch.zeros(1, 4, 4, 4, 4), torch.zeros(filters, 4, 3, 3, 3), None, padding=(1, 1, 1))
    assert strides == [stride]


@pytest.mark.parametrize("padding", [(0, 0, 0), (1, 1, 1), (0, 1, 1)])
@pytest.mark.parametrize(("channels", "filters"), [(3, 16), (16, 4)])
@pytest.mark.parametrize("depth", [4, 10])
def test_halves_of_a_single_sample_equal_the_whole(
    depth: int, channels: int, filters: int, padding: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(depth)

    def integers(*shape: int) -> torch.Tensor:
        # Sums of few small integers are exact in float32.
        values = torch.randint(-4, 5, shape, generator=random).float()
        return values.contiguous(memory_format=torch.channels_last_3d) if values.ndim == 5 else values

    volume, weight, bias = (
        integers(1, channels, depth, 6, 8),
        integers(filters, channels, 3, 3, 3),
        integers(filters),
    )
    exact = [each.double().requires_grad_() for each in (volume, weight, bias)]
    expected = functional.conv3d(exact[0], exact[1], exact[2], padding=padding)
    grad_output = integers(*expected.shape)
    expected_gradients = torch.autograd.grad(expected, exact, grad_output.double())
    torch_conv3d, batches = functional.conv3d, set()

    def record(volume: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        batches.add(len(volume))
        return torch_conv3d(volume, *others, **options)

    monkeypatch.setattr(functional, "conv3d", record)
    found = conv3d(volume, weight, bias, padding=padding)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    gradients = conv3d_backward(grad_output, volume, weight, padding=padding, output_mask=[True] * 3)
    for one, other in zip([found, *gradients], [expected, *expected_gradients], strict=True):
        assert one is not None and torch.equal(one.double(), other)
    assert batches == {2}
    grad_input, grad_weight, grad_bias = conv3d_backward(
        grad_output, volume, weight, padding=padding, output_mask=[False, True, False]
    )
    assert grad_input is None and grad_bias is None and grad_weight is not None
    assert torch.equal(grad_weight.double(), expected_gradients[1])


def test_halves_are_used_where_torch_does_without_onednn() -> None:
    backends = []
    for rows in (cpu_conv.NATIVE_ROWS, cpu_conv.NATIVE_ROWS + 4 * 128):
        volume, weight = torch.empty(1, 4, rows // (4 * 128), 128, 8), torch.empty(32, 4, 3, 3, 3)
        ones, zeros = [1] * 3, [0] * 3
        chosen = torch._C._select_conv_backend(volume, weight, None, ones, zeros, ones, False, zeros, 1)
        backends.append(chosen.name)
    assert backends == ["Slow3d", "Mkldnn"]
