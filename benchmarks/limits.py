"""Limits of the compute stage: rates of matrix products and copies, and operations of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.recipes import Network, shape_of
from benchmarks.timing import timed
from cosmoflow_dali.compute.step import configure_float32, input_dtype
from cosmoflow_dali.models.build import build_model

MATRIX_SIZE = {"cpu": 4096, "cuda": 8192}
"""Rows and columns of the measured matrices, by device type."""

COPIED = 1 << 30
"""Bytes of the measured copy."""


WARM_UP = {"cpu": 0.0, "cuda": 0.5}
"""Seconds of work before a measurement, by device type: a GPU that was idle first raises its clock."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of the machine: operations per second of a matrix product, by precision, and bytes of a copy."""

    matrix: dict[str, float]
    copy: float


def measure_limits(precisions: set[str], device: torch.device) -> Limits:
    """Measure the limits of the idle `device`."""
    matrix = {}
    for precision in sorted(precisions):
        configure_float32(precision)  # type: ignore[arg-type]
        matrix[precision] = matrix_rate(input_dtype(precision), device)  # type: ignore[arg-type]
    return Limits(matrix, copy_rate(device))


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return operations per second of a large matrix product, the best of six runs and all libraries.

    A convolution with a kernel of one voxel is a matrix product too. On a CPU it uses oneDNN, where torch's
    product uses MKL, which is slow on other processors than Intel's; numpy uses OpenBLAS.
    """
    size = MATRIX_SIZE[device.type]
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    voxels, kernel = a.T.reshape(1, size, 16, 16, size // 256), b.reshape(size, size, 1, 1, 1)
    voxels = voxels.contiguous(memory_format=torch.channels_last_3d)
    products: list[Callable[[], object]] = [lambda: a @ b, lambda: functional.conv3d(voxels, kernel)]
    if device.type == "cpu" and dtype == torch.float32:
        left, right = a.numpy(), b.numpy()
        products.append(lambda: left @ right)
    return 2.0 * size**3 / min(_least_seconds(product, device) for product in products)


def copy_rate(device: torch.device) -> float:
    """Return bytes per second that a copy reads and writes, the best of six runs."""
    source, target = (torch.zeros(COPIED // 4, device=device) for _ in range(2))
    return 2.0 * source.nbytes / _least_seconds(lambda: target.copy_(source), device)


def _least_seconds(act: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of six calls after those of the warm-up."""
    end = time.perf_counter() + WARM_UP[device.type]
    while time.perf_counter() < end:
        timed(act, 1, device)
    return min(timed(act, 1, device)[0] for _ in range(6))


def step_flops(network: Network, size: int) -> float:
    """Return the operations of a training step of one sample, by torch's counter."""
    shape = shape_of(network, size)
    model = build_model(shape, seed=0).to("meta")
    volume = torch.empty(1, 4, size, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(volume).sum().backward()
    return float(counter.get_total_flops())
