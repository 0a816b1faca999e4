"""Compile every Triton kernel for GPUs, without one, and model the time of a step: `make kernels`.

    python benchmarks/kernel_report.py
    python benchmarks/kernel_report.py --output

The first table has the machine code of each kernel and variant on sm_80, sm_90 and sm_100. The second one has
the parts of a step of the reference network at 128^3, batch 1, bfloat16, by a fixed model: a kernel takes the
longest of its arithmetic at 60% of the dense tensor-core rate, its memory traffic at 85% of the bandwidth,
its instructions at four and its shared memory at 128 bytes a cycle and multiprocessor, and each node of the
CUDA graph another 3 us. Instructions and shared memory are counted in Triton's kernels only. The model has
not been compared with a GPU.

The exit status is 1 if a kernel spills registers, a convolution in half precision uses no tensor cores, a
kernel exceeds its budget of instructions, or Triton's interpreter disagrees with float64.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.aot import Launch, MachineCode, compile_launch, recorded_launches
from benchmarks.step_model import CHIPS, Part, kernel_work, model_step
from cosmoflow_dali.compute.kernels import Shape, find_faults
from cosmoflow_dali.models.blocks import pool_then_activate
from cosmoflow_dali.models.reference import Block
from cosmoflow_dali.models.triton_block import first_block
from cosmoflow_dali.models.triton_pool import pool, pool_block
from pipelines.formats.packed.gather_triton import gather
from pipelines.formats.packed.header import escape_planes
from pipelines.tables import format_table

SIZE, FILTERS = 128, 32
"""Edge of a sample, and filters of the first block: the benchmark's."""

HALF = torch.float16, torch.bfloat16

BUDGETS = {
    "triton_block.forward": 170,
    "triton_block.backward": 450,
    "triton_pool.forward": 100,
    "triton_pool.backward": 75,
    "gather_triton.gather": 60,
    "gather_triton.count": 12,
}
"""Limit of a thread's instructions for each element of the output, some tenths above those of
Triton 3.9.0; 3.6.0 needs 162 for 16 filters on sm_100."""


@dataclass(frozen=True)
class Row:
    """A kernel on an architecture."""

    kernel: str
    variant: str
    architecture: int
    code: MachineCode
    executed: int
    faults: tuple[str, ...]


def variants() -> list[tuple[str, Launch]]:
    """Return all kernels as the benchmark launches them, for each supported shape and type."""
    found: list[tuple[str, Callable[[], object]]] = []
    for dtype in HALF:
        name = str(dtype).removeprefix("torch.")
        found += [(f"{filters} filters, {name}", partial(_block, filters, dtype)) for filters in (16, 32, 64)]
        found += [
            (f"{FILTERS << block} filters, {name}", partial(_pool, FILTERS << block, SIZE >> block, dtype))
            for block in range(5)
        ]
    # Tables whose escapes have no byte, one, two and three.
    for rows in (200, 400, 40_000, 70_000):
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            found.append((f"{rows:,} rows, {name}", partial(_gather, rows, dtype)))
    launches = []
    for name, call in found:
        with recorded_launches() as recorded:
            call()
        launches += [(name, launch) for launch in recorded]
    return launches


def _empty(*shape: int, dtype: torch.dtype, gradient: bool = False) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=gradient)


def _block(filters: int, dtype: torch.dtype) -> None:
    volume = _empty(1, SIZE, SIZE, SIZE, 4, dtype=dtype).permute(0, 4, 1, 2, 3)
    kernel, bias = (
        _empty(*shape, dtype=dtype, gradient=True) for shape in ((filters, 4, 3, 3, 3), (filters,))
    )
    first_block(volume, kernel, bias).sum().backward()


def _pool(filters: int, edge: int, dtype: torch.dtype) -> None:
    values = _empty(1, edge, edge, edge, filters, dtype=dtype).permute(0, 4, 1, 2, 3).requires_grad_()
    pool(values, _empty(filters, dtype=dtype, gradient=True)).sum().backward()


def _gather(rows: int, dtype: torch.dtype) -> None:
    symbols = _empty(SIZE**3, dtype=torch.uint8)
    escapes = _empty(max(1, escape_planes(rows)), SIZE**3 // 8, dtype=torch.uint8)
    table = _empty(rows + 1, 4, dtype=torch.float32)
    out = _empty(SIZE, SIZE, SIZE, 4, dtype=dtype)
    gather(symbols, escapes, table, out, byte_sum=0, by_mean=False)


def examine(name: str, launch: Launch, architecture: int) -> Row:
    """Compile `launch` for `architecture` and check the result."""
    code = compile_launch(launch, architecture)
    executed = code.executed(kernel_work(launch).trips)
    each = 32 * executed * code.warps * launch.programs / kernel_work(launch).outputs
    faults = []
    if code.stack:
        faults.append(f"{code.stack} bytes of stack")
    if launch.name.startswith("triton_block") and not code.tensor_core:
        faults.append("no tensor-core instruction")
    if each > BUDGETS[launch.name]:
        faults.append(f"{each:.0f} instructions an element, the budget is {BUDGETS[launch.name]}")
    return Row(launch.name, name, architecture, code, executed, tuple(faults))


def interpret() -> list[str]:
    """Compare all candidates with float64 in Triton's interpreter; return the faults."""
    faults = []
    for edge in (2, 4, 6, 8):
        for filters in (16, 32, 64):
            first, later = Shape(1, 4, filters, edge), Shape(1, 16, filters, edge)
            blocks: list[tuple[str, Block, Shape]] = [
                ("triton block", first_block, first),
                ("triton pool", pool_block, later),
                ("torch", pool_then_activate, first),
            ]
            for name, block, shape in blocks:
                # The interpreter does not multiply bfloat16.
                found = find_faults({name: block}, shape, "fp16", torch.device("cpu"))[name]
                faults += [f"{name}, {filters} filters, edge {edge}: {found}"] if found else []
    return faults


def show_kernels(rows: Sequence[Row]) -> None:
    """Print the table of the kernels' machine code."""
    head = [
        "kernel",
        "variant",
        "sm",
        "registers",
        "stack",
        "shared",
        "warps",
        "tensor",
        "code",
        "loops",
        "run",
        "",
    ]
    table = [head]
    for row in rows:
        code = row.code
        figures = (code.registers, code.stack, code.shared, code.warps, code.tensor_core, code.instructions)
        loops = ", ".join(map(str, code.loops)) or "-"
        words = [row.kernel, row.variant, str(row.architecture), *map(str, figures), loops, str(row.executed)]
        table.append([*words, "; ".join(row.faults)])
    print(format_table(table))


def show_step(parts: Sequence[Part]) -> dict[str, float]:
    """Print the parts of a step on each chip; return the milliseconds of a step by chip."""
    table = [
        ["part", "nodes", "GFLOP", "MB", *(f"{chip.name} us" for chip in CHIPS), "limits on an H100, us"]
    ]
    totals = {chip.name: 0.0 for chip in CHIPS}
    for part in parts:
        flops, moved = (sum(getattr(node, name) for node in part.nodes) for name in ("flops", "bytes"))
        words = [part.name, str(len(part.nodes)), f"{1e-9 * flops:.2f}", f"{1e-6 * moved:.1f}"]
        for chip in CHIPS:
            seconds = sum(part.limits(chip).values())
            totals[chip.name] += 1e3 * seconds
            words.append(f"{1e6 * seconds:.0f}")
        limits = part.limits(CHIPS[1]).items()
        table.append([*words, ", ".join(f"{limit} {1e6 * seconds:.0f}" for limit, seconds in limits)])
    count = sum(len(part.nodes) for part in parts)
    table.append(["step", str(count), "", "", *(f"{1e3 * total:.0f}" for total in totals.values()), ""])
    print(format_table(table))
    return totals


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a kernel has a fault."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--interpret", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.interpret:
        faults = interpret()
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        return int(bool(faults))
    # The interpreter replaces Triton's compiler in the whole process.
    checked = subprocess.Popen(
        [sys.executable, __file__, "--interpret"], env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    work = [(name, launch, chip) for name, launch in variants() for chip in (80, 90, 100)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool_of_threads:
        rows = list(pool_of_threads.map(lambda each: examine(*each), work))
    show_kernels(rows)
    parts = model_step()
    totals = show_step(parts)
    bad = [row for row in rows if row.faults]
    if checked.wait():
        print("error: Triton's interpreter disagrees with float64", file=sys.stderr)
    for row in bad:
        print(
            f"error: {row.kernel} ({row.variant}) on sm_{row.architecture}: {'; '.join(row.faults)}",
            file=sys.stderr,
        )
    if options.output:
        record: dict[str, Any] = {
            "triton": triton.__version__,
            "kernels": [asdict(row) for row in rows],
            "step": [asdict(part) for part in parts],
            "step_ms": totals,
        }
        print("written to", harness.save("kernel_report", {}, record, options.output))
    return int(bool(bad) or checked.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
