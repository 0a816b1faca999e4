"""Kernels compiled ahead of time: their figures, faults that end in status 1, and the model of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import aot, kernel_report
from benchmarks.aot import Launch, MachineCode
from benchmarks.step_model import CHIPS, Node, Part
from cosmoflow_dali.models.blocks import pool_then_activate

H100 = next(chip for chip in CHIPS if chip.name == "H100")

COMPILED = """
import json
from dataclasses import asdict
from benchmarks import step_model
from benchmarks.aot import MachineCode, compile_launch, recorded_launches
from benchmarks.kernel_report import _pool
from pipelines.formats.packed.gather_triton import gather
import torch
with recorded_launches() as launches:
    _pool(32, 16, torch.float16)
code = [asdict(compile_launch(launch, 90)) for launch in launches]
step_model.compile_launch = lambda *_: MachineCode(100, 0, 0, 8, 12, 600, (), 4096, ())
parts = {
    part.name: [sum(node.flops for node in part.nodes), sum(node.bytes for node in part.nodes)]
    for part in step_model.model_step()
}
def table(rows, byte_sum):
    with recorded_launches() as launches:
        symbols, escapes, out = (torch.empty(*shape, dtype=dtype, device="meta") for shape, dtype in
            (((8192,), torch.uint8), ((1, rows), torch.uint8), ((16, 16, 32, 4), torch.float16)))
        values = torch.empty(rows, 4, device="meta")
        gather(symbols, escapes, values, out, byte_sum=byte_sum, by_mean=False)
    return [compile_launch(launch, 90).instructions for launch in launches]

print(json.dumps([code, parts, [table(2, 1), table(17, 32), table(33, 7)], [table(300, 1), table(400, 16)]]))
"""


def test_kernels_are_compiled_and_the_step_has_the_operations_of_the_network() -> None:
    # In a process that does not interpret kernels, as these tests do.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        cwd=root, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (forward, backward), parts, few, many = json.loads(done.stdout)
    for code in (forward, backward):
        assert 0 < code["registers"] <= 255 and code["warps"] == 4
        assert code["stack"] == code["tensor_core"] == 0 and code["instructions"] > 100
    # The source of the backward pass has one loop.
    assert forward["loops"] == [] and 0 < backward["loops"][0] < backward["instructions"]
    for block, (channels, filters) in enumerate([(32, 64), (64, 128), (128, 256), (256, 512)], start=2):
        flops = 2 * 27 * channels * filters * (128 >> (block - 1)) ** 3
        assert parts[f"block {block} forward"][0] == flops
        assert parts[f"block {block} backward"][0] == 2 * flops
    # The symbols twice, two bytes for each eighth voxel, a table of 40,000 rows, and four numbers a voxel.
    assert parts["gather"][1] == pytest.approx((2 + 2 / 8 + 8) * 128**3 + 40_000 * 8, rel=0.05)
    assert parts["optimizer"][1] == 5 * 4 * 8_907_556
    # Samples differ in the rows of their tables, of which there may be one: none waits for a compiler.
    assert few[0] == few[1] == few[2] and many[0] == many[1]


def test_loops_that_the_compiler_unrolled_are_part_of_the_code() -> None:
    code = MachineCode(
        32, 0, 0, 4, 0, instructions=500, loops=(100,), shared_bytes=64, shared_bytes_of_loops=(16,)
    )
    assert code.executed((3, 2)) == 500 + 2 * 100 and code.moved((3, 2)) == 64 + 2 * 16
    nested = replace(code, loops=(100, 40))
    assert nested.executed((3, 2)) == 500 + 2 * 100 + 3 * 1 * 40
    with pytest.raises(ValueError, match="2 loops"):
        nested.executed((3,))


MACHINE_CODE = """
.text._kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0010*/                   STS.64 [R9], R4 ;
        /*0020*/                   STS.U16 [R9], R4 ;
        /*0030*/                   LDS R4, [R9] ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9+0x800], desc[UR6][R12.64] ;
        /*0050*/                   LDSM.16.MT88.4 R8, [R9] ;
        /*0060*/                   LDSM.16.M88 R8, [R9] ;
        /*0070*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0090*/                   EXIT ;
"""


def test_shared_memory_of_machine_code() -> None:
    instructions, loops = aot._parse(MACHINE_CODE)
    # Of 32 threads, matrices of 8 x 8 numbers, and a quarter of a product's factors in shared memory.
    threads = [0, 32 * 8, 32 * 2, 32 * 4, 32 * 16]
    matrices = [4 * 128, 128, (64 + 256) * 16 * 2 // 4, 64 * 16 * 2 // 4]
    assert [each.shared_bytes for each in instructions] == [*threads, *matrices, 0]
    assert loops == []


def named(module: str, name: str) -> Any:
    """Return a kernel of this name without code."""
    return SimpleNamespace(__module__=f"cosmoflow_dali.models.{module}", __name__=name)


def test_faults_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"CHANNELS": 4, "FILTERS": 32, "cells": 128 * 1024, "CELLS": 128}
    launch = Launch(named("triton_block", "_forward"), 1024, arguments, {})
    good = MachineCode(100, 0, 20000, 8, 12, 600, (220,), 4096, (512,))
    for change, word in (
        ({"stack": 8}, "stack"),
        ({"tensor_core": 0}, "tensor-core"),
        ({"instructions": 60000}, "budget"),
    ):
        monkeypatch.setattr(kernel_report, "compile_launch", lambda *_, c=change: replace(good, **c))
        (fault,) = kernel_report.examine("a", launch, 90).faults
        assert word in fault
    monkeypatch.setattr(kernel_report, "compile_launch", lambda *_: good)
    assert kernel_report.examine("a", launch, 90).faults == ()


def test_kernels_that_disagree_in_the_interpreter_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*inputs: torch.Tensor) -> torch.Tensor:
        return 1.01 * pool_then_activate(*inputs)

    monkeypatch.setattr(kernel_report, "first_block", off)
    monkeypatch.setattr(kernel_report, "pool_block", pool_then_activate)
    faults = kernel_report.interpret()
    assert len(faults) == 12 and all(fault.startswith("triton block, ") for fault in faults)
    monkeypatch.setattr(kernel_report, "first_block", pool_then_activate)
    assert kernel_report.interpret() == []


def test_the_largest_resource_limits_a_kernel() -> None:
    # 1 ms of each at the shares of the rates.
    flops, moved = 1e-3 * 0.6 * H100.flops, 1e-3 * 0.85 * H100.bandwidth
    part = Part("a", (Node(flops, moved / 2), Node(flops / 4, moved)))
    limits = part.limits(H100)
    assert limits == pytest.approx({"tensor cores": 1e-3, "memory": 1e-3, "launches": 6e-6})
    shared = Node(flops, issued={90: 1e-3 * 4 * 132 * H100.clock}, shared={90: 2e-3 * 128 * 132 * H100.clock})
    assert Part("a", (shared,)).limits(H100) == pytest.approx({"shared memory": 2e-3, "launches": 3e-6})


def test_tensors_count_once_as_traffic() -> None:
    arguments = {"a": torch.empty(10, device="meta"), "b": torch.empty(6, dtype=torch.uint8), "count": 3}
    assert Launch(named("a", "b"), 1, arguments, {}).bytes == 46
