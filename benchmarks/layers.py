"""Time, operations and memory traffic of each convolution block of the reference network alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.timing import timed
from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.step import autocast
from cosmoflow_dali.models.blocks import plain_max_block
from cosmoflow_dali.models.reference import Block, CosmoFlow
from pipelines.sample import Batch

_REPEATED = {"cpu": 2, "cuda": 50}
"""Repetitions of a block per measurement, by device type."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Figures of a convolution block, forward and backward.

    Attributes:
        ms: Time.
        gflop: Operations.
        bytes_moved: Minimum memory traffic: input and output once forward, and both with gradients backward.
    """

    name: str
    ms: float
    gflop: float
    bytes_moved: float


def layers_alone(model: nn.Module, batch: Batch, compute: ComputeConfig, *, plain: bool) -> Iterator[Layer]:
    """Measure each block of the reference network on input of its shape; `plain` uses torch's operations."""
    if not isinstance(model, CosmoFlow):
        return
    volume, device = batch.volume, batch.volume.device
    for number, (conv, own) in enumerate(zip(model.convs, model.blocks, strict=True)):
        weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
        block = plain_max_block if plain else own
        given = torch.rand_like(volume).requires_grad_(number > 0)
        with autocast(compute.precision, device):
            made = block(given, weight, bias)
        gradient = torch.rand_like(made)

        def both(
            given: torch.Tensor = given,
            weight: torch.Tensor = weight,
            bias: torch.Tensor = bias,
            gradient: torch.Tensor = gradient,
            block: Block = block,
        ) -> None:
            with autocast(compute.precision, device):
                made = block(given, weight, bias)
            wanted = [each for each in (given, weight, bias) if each.requires_grad]
            torch.autograd.grad(made, wanted, gradient)

        times = _REPEATED[device.type]
        act = _captured(both) if device.type == "cuda" else both
        act()
        wall = min(timed(act, times, device)[0] / times for _ in range(3))
        products = 27 * weight.shape[1] * weight.shape[0] * given[0, 0].numel() * given.shape[0]
        passes = 3 if number else 2
        moved = given.nbytes * (3 if number else 2) + 2 * made.nbytes
        yield Layer(f"block {number + 1}", 1e3 * wall, 2e-9 * products * passes, moved)
        volume = made.detach()


def _captured(act: Callable[[], None]) -> Callable[[], None]:
    """Return `act` as a CUDA graph, because launching dominates the time of a small block's kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            act()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        act()
    return graph.replay
