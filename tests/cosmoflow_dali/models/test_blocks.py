"""The fused blocks against torch, finite differences, and TensorFlow's rule for near-ties."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from cosmoflow_dali.models import cpu_conv
from cosmoflow_dali.models.blocks import LEAK, TIE, max_block, norm_block, plain_max_block, pool_then_activate

DOUBLE = torch.float64


def inputs(*shape: int, layout: torch.memory_format = torch.channels_last_3d) -> list[torch.Tensor]:
    """Return a volume of `shape`, a kernel for 5 channels and a bias, in float64."""
    generator = torch.Generator().manual_seed(2)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=DOUBLE)

    volume = draw(*shape).contiguous(memory_format=layout)
    return [each.requires_grad_() for each in (volume, draw(5, shape[1], 3, 3, 3), draw(5))]


def plain_norm_block(
    volume: torch.Tensor, kernel: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    """Apply `norm_block` by torch's operations."""
    values = functional.conv3d(functional.pad(volume, (1,) * 6, mode="circular"), kernel)
    values = functional.batch_norm(values, None, None, scale, shift, training=True, eps=eps)
    return functional.avg_pool3d(functional.leaky_relu(values, 0.3), 2)


SHAPES = [(2, 4, 8, 8, 8), (1, 1, 2, 4, 6), (3, 2, 6, 2, 4)]


LAYOUTS = torch.channels_last_3d, torch.contiguous_format


def assert_equal_gradients(
    one: torch.Tensor, other: torch.Tensor, arguments: list[torch.Tensor], tolerance: float
) -> None:
    gradient = torch.linspace(-1, 1, one.numel(), dtype=DOUBLE).view(one.shape)
    found, expected = (torch.autograd.grad(each, arguments, gradient) for each in (one, other))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("lanes", "tolerance"), [(0, 0.0), (16, 1e-12)], ids=["voxels", "pairs"])
def test_max_block_equals_torch(lanes: int, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pairs of voxels sum in another order.
    monkeypatch.setattr(cpu_conv, "LANES", lanes)
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        arguments = inputs(*shape, layout=layout)
        fused, plain = max_block(*arguments), plain_max_block(*arguments)
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
        # Random doubles have no near-ties, so both choose the same maxima.
        assert_equal_gradients(fused, plain, arguments, 1e-12)


def test_pooling_before_activation_changes_no_bit() -> None:
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16, torch.float16)):
        volume, kernel, bias = (each.detach().to(dtype) for each in inputs(*shape))
        added = functional.conv3d(volume, kernel, padding=1) + bias[:, None, None, None]
        expected = functional.max_pool3d(functional.leaky_relu(added, LEAK), 2)
        assert torch.equal(pool_then_activate(volume, kernel, bias), expected)


def test_pooling_before_activation_has_the_same_gradients() -> None:
    for shape in SHAPES:
        arguments = inputs(*shape)
        reordered, plain = pool_then_activate(*arguments), plain_max_block(*arguments)
        torch.testing.assert_close(reordered, plain, rtol=1e-12, atol=1e-12)
        assert_equal_gradients(reordered, plain, arguments, 1e-10)


@pytest.mark.parametrize("highest", [0.7, -0.7])
def test_near_ties_share_the_gradient(highest: float) -> None:
    # With the identity as kernel, the output of the convolution is the volume.
    kernel = torch.zeros(1, 1, 3, 3, 3, dtype=DOUBLE)
    kernel[0, 0, 1, 1, 1] = 1.0
    # After LeakyReLU: within TIE, beyond it, far below.
    slope = 1.0 if highest > 0 else 0.3
    below = torch.tensor([0.0, 0.9 * TIE, 1.1 * TIE, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=DOUBLE) / slope
    volume = (highest - below).view(1, 1, 2, 2, 2).requires_grad_()
    max_block(volume, kernel, torch.zeros(1, dtype=DOUBLE)).backward()
    assert volume.grad is not None
    expected = torch.tensor([slope, slope, 0, 0, 0, 0, 0, 0], dtype=DOUBLE)
    torch.testing.assert_close(volume.grad.flatten(), expected)


def test_norm_block_equals_torch() -> None:
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        volume, kernel, shift = inputs(*shape, layout=layout)
        scale = torch.linspace(-1, 2, 5, dtype=DOUBLE).requires_grad_()
        fused, mean, variance = norm_block(volume, kernel, scale, shift, 1e-3)
        plain = plain_norm_block(volume, kernel, scale, shift, 1e-3)
        torch.testing.assert_close(fused, plain)
        assert_equal_gradients(fused, plain, [volume, kernel, scale, shift], 1e-9)
        values = functional.conv3d(functional.pad(volume, (1,) * 6, mode="circular"), kernel)
        torch.testing.assert_close(mean, values.mean((0, 2, 3, 4)))
        torch.testing.assert_close(variance, values.var((0, 2, 3, 4), unbiased=False))


def norm_alone(volume: torch.Tensor, kernel: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return the pooled result of `norm_block`, with `shift` as scale too."""
    return norm_block(volume, kernel, shift, shift, 1e-3)[0]


@pytest.mark.parametrize("block", [max_block, norm_alone])
def test_gradients_match_finite_differences(block: Callable[..., torch.Tensor]) -> None:
    arguments, step = inputs(1, 2, 4, 2, 4), 1e-6
    gradients = torch.autograd.grad(block(*arguments).square().sum(), arguments)
    generator = torch.Generator().manual_seed(5)
    for changed, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=generator, dtype=DOUBLE)
        ends = []
        for sign in (-1, 1):
            moved = [each.detach() for each in arguments]
            moved[changed] = moved[changed] + sign * step * direction
            ends.append(block(*moved).square().sum())
        torch.testing.assert_close(
            (ends[1] - ends[0]) / (2 * step), (gradient * direction).sum(), rtol=1e-6, atol=1e-6
        )


def test_second_backward_pass_is_refused() -> None:
    pooled = max_block(*inputs(1, 2, 4, 4, 4)).sum()
    pooled.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        pooled.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_sets_the_dtype_of_the_convolution(dtype: torch.dtype) -> None:
    volume, kernel, bias = (each.detach().float().requires_grad_() for each in inputs(2, 4, 8, 8, 8))
    with torch.autocast("cpu", dtype):
        lower = max_block(volume, kernel, bias)
        normed, mean, _ = norm_block(volume, kernel, bias, bias, 1e-3)
    assert (lower.dtype, normed.dtype, mean.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(lower.float(), max_block(volume, kernel, bias), rtol=0.02, atol=0.2)
    (lower.float().sum() + normed.sum()).backward()
    assert volume.grad is not None and volume.grad.dtype == torch.float32


def test_running_statistics_equal_those_of_torch() -> None:
    from cosmoflow_dali.models.open import update_running_stats

    volume, kernel, _ = inputs(2, 4, 8, 8, 8)
    norm, plain = nn.BatchNorm3d(5).double(), nn.BatchNorm3d(5).double()
    _, mean, variance = norm_block(volume, kernel, norm.weight, norm.bias, norm.eps)
    update_running_stats(norm, mean, variance, 2 * 8**3)
    plain(functional.conv3d(functional.pad(volume, (1,) * 6, mode="circular"), kernel))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)
