"""The table of compute_bench: its rows, and how they are printed."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from benchmarks import harness
from benchmarks.layers import Layer
from benchmarks.limits import Limits, step_flops
from pipelines.tables import format_table

PLAIN, RECORD = "plain PyTorch", "the record's recipe"

LOOP = 0.95
"""Target of the whole loop: minimum fraction of the samples per second on resident data."""

TARGETS = {128: {"share_of_matrix": 0.62, "speed_of_plain": 1.35}, 32: {"speed_of_plain": 1.5}}
"""Targets of float32 on a CPU, by size: minimum fraction of the matrix product's rate, and minimum ratio of
the samples per second to those of plain PyTorch."""


@dataclass(frozen=True, slots=True)
class Result:
    """A row.

    Attributes:
        samples_per_s: Of whole steps.
        forward_ms: Wall time of the forward pass per sample; never part of a graph.
        cpu_ms: CPU time of whole steps per sample.
        tflops: Operations that the network needs, per second.
        share_of_matrix: Fraction of the rate of a matrix product in the same precision.
        speed_of_plain, speed_of_record: Samples per second relative to those rows.
        speed_of_resident: Samples per second of a whole loop relative to the same steps on resident data.
        peak: Peak memory in bytes.
        layers: Each block of the network alone, on a GPU as a graph.
    """

    precision: str
    samples_per_s: harness.Spread
    forward_ms: harness.Spread
    cpu_ms: harness.Spread
    tflops: float
    share_of_matrix: float
    speed_of_plain: harness.Spread
    speed_of_record: harness.Spread | None
    speed_of_resident: harness.Spread | None
    peak: int
    layers: list[Layer]


def row_name(title: str, batch_size: int) -> str:
    """Return the name of a row of `batch_size`."""
    return f"{title}, batch {batch_size}"


def show(
    options: argparse.Namespace, device: torch.device, limits: Limits, results: dict[str, Result]
) -> None:
    """Print medians, 10th and 90th percentiles over the rounds, and the targets."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    flops = step_flops(options.network, options.size)
    print(f"{options.network} network at {options.size}^3 on {where}, {1e-9 * flops:.1f} GFLOP a sample")
    for precision, rate in limits.matrix.items():
        print(f"limit: matrix product {precision} {1e-12 * rate:.3f} TFLOP/s")
    print(f"limit: copy {1e-9 * limits.copy:.1f} GB/s, read and written")
    table = [
        ["", "samples/s", "forward ms", "CPU ms", "TFLOP/s", "of limit", "peak GB", "/ plain", "/ record"]
    ]
    for name, row in results.items():
        times = f"{row.forward_ms.median:.2f}", f"{row.cpu_ms.median:.1f}"
        rates = f"{row.tflops:.3f}", f"{row.share_of_matrix:.1%}", f"{1e-9 * row.peak:.2f}"
        record = f"{row.speed_of_record.median:.2f}" if row.speed_of_record else ""
        table.append([name, row.samples_per_s.text(1), *times, *rates, row.speed_of_plain.text(2), record])
    print(format_table(table))
    for name, row in results.items():
        if row.layers:
            print(f"{name}, single blocks, forward and backward:")
        for layer in row.layers:
            rate = 1e9 * layer.gflop / (1e-3 * layer.ms)
            share, copying = rate / limits.matrix[row.precision], layer.bytes_moved / limits.copy
            print(
                f"  {layer.name} {layer.ms:9.2f} ms: {layer.gflop:6.1f} GFLOP at {1e-12 * rate:.3f} TFLOP/s,"
                f" {share:.0%} of the limit; {layer.bytes_moved / 1e6:.0f} MB, {1e3 * copying:.2f} ms by copy"
            )
    if device.type == "cpu":
        _show_targets(options.size, results)
    show_over_record(results)
    for name, row in results.items():
        if row.speed_of_resident:
            ratio = row.speed_of_resident.text(3)
            print(f"{name}: {ratio} of the samples/s on resident data; target: at least {LOOP:g}")


def _show_targets(size: int, results: dict[str, Result]) -> None:
    for name, row in results.items():
        for quantity, target in TARGETS.get(size, {}).items() if name.startswith("fp32") else ():
            value = getattr(row, quantity)
            value = value if isinstance(value, float) else value.median
            print(f"{name}: {quantity} {value:.2f}; target of float32 on a CPU: at least {target:g}")


def show_over_record(results: dict[str, Result]) -> None:
    """Print the speed of the project's rows relative to the record's batch of one sample."""
    record = results.get(row_name(RECORD, 1))
    for name, row in results.items():
        if record is not None and not name.startswith((PLAIN, RECORD)):
            speed = row.samples_per_s.median / record.samples_per_s.median
            print(f"{name}: {speed:.2f} times the samples/s of {row_name(RECORD, 1)}")
