"""Compilation of Triton kernels ahead of time, without a GPU, and figures of the machine code."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = "num_warps", "num_stages"
_ALIGNMENT = 16
"""Divisor by which Triton specialises addresses and numbers at run time."""

_WARP = 32
"""Threads of a warp."""

_LONG_LOOP = 40
"""Instructions from which a loop is one of the source, not a wait for a barrier."""


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, recorded instead of executed.

    Attributes:
        kernel: The kernel.
        programs: Number of programs.
        arguments: Its arguments by name: tensors, numbers and constants.
        options: `num_warps` and `num_stages`, where given.
    """

    kernel: JITFunction[Any]
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """Module and name of the kernel."""
        return f"{self.kernel.__module__.rsplit('.', 1)[-1]}.{self.kernel.__name__.lstrip('_')}"

    @property
    def bytes(self) -> int:
        """Bytes of all tensors: the memory traffic of a kernel that reads or writes each once."""
        tensors = [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches of Triton kernels in the body; nothing is compiled or executed."""
    launches: list[Launch] = []

    def record(kernel: JITFunction[Any], *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
        programs = 1
        for edge in grid:
            programs *= edge
        launches.append(Launch(kernel, programs, arguments, options))

    with patch.object(JITFunction, "run", record):
        yield launches


@dataclass(frozen=True)
class MachineCode:
    """Figures of a compiled kernel.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread in local memory, for values that its registers do not hold.
        shared: Bytes of shared memory of a program.
        warps: Of a program.
        tensor_core: Number of instructions for tensor cores.
        instructions: Total number of instructions.
        loops: Number of instructions of each loop, the outermost first.
        shared_bytes: Bytes that a warp reads and writes in shared memory, if each instruction runs once.
            Operands of tensor cores count, except on sm_100, whose instructions do not say their shape.
        shared_bytes_of_loops: Those of each loop.
    """

    registers: int
    stack: int
    shared: int
    warps: int
    tensor_core: int
    instructions: int
    loops: tuple[int, ...]
    shared_bytes: int
    shared_bytes_of_loops: tuple[int, ...]

    def executed(self, trips: Sequence[int]) -> int:
        """Return the instructions that a warp executes.

        Args:
            trips: Iterations of each loop of the source, the outermost first. The compiler unrolls the
                innermost ones if it has fewer loops.
        """
        return _repeat(self.instructions, self.loops, trips)

    def moved(self, trips: Sequence[int]) -> int:
        """Return the bytes that a warp reads and writes in shared memory; see `executed`."""
        return _repeat(self.shared_bytes, self.shared_bytes_of_loops, trips)


def _repeat(once: int, loops: Sequence[int], trips: Sequence[int]) -> int:
    """Return the cost of code that costs `once` if each of its `loops` runs once."""
    if len(loops) > len(trips):
        raise ValueError(f"the code has {len(loops)} loops, the source {len(trips)}")
    repeats = 1
    for cost, count in zip(loops, trips, strict=False):
        once += repeats * (count - 1) * cost
        repeats *= count
    return once


def compile_launch(launch: Launch, architecture: int) -> MachineCode:
    """Compile the kernel of `launch` as its arguments specialise it, for sm_`architecture`.

    Raises:
        RuntimeError: Triton cannot compile it.
    """
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        aligned = [["tt.divisibility", _ALIGNMENT]]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            # The allocator aligns tensors.
            signature[name], attributes[(position,)] = f"*{_TYPES[value.dtype]}", aligned
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % _ALIGNMENT == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = aligned
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), launch.options)
    return _examine(compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps)


@functools.cache
def _examine(cubin: bytes, shared: int, warps: int) -> MachineCode:
    """Return the figures of the machine code `cubin`, which takes as long as to compile it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        # Its analysis of data flow would add nothing to this code, and a third to the time.
        code = _run("nvdisasm", "-c", "--no-dataflow", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    instructions, loops = _parse(code)
    return MachineCode(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=shared,
        warps=warps,
        tensor_core=sum("MMA" in each.name for each in instructions),
        instructions=sum(each.name != "NOP" for each in instructions),
        loops=tuple(last - first for first, last in loops),
        shared_bytes=sum(each.shared_bytes for each in instructions),
        shared_bytes_of_loops=tuple(
            sum(each.shared_bytes for each in instructions[first:last]) for first, last in loops
        ),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


class _Instruction(NamedTuple):
    """An instruction, and the bytes of shared memory that a warp reads or writes in it."""

    name: str
    shared_bytes: int


def _parse(code: str) -> tuple[list[_Instruction], list[tuple[int, int]]]:
    """Return the instructions of nvdisasm's `code`, and the range of each loop, the outermost first."""
    instructions: list[_Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, int]] = []
    end = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+ +)?)([A-Z][\w.]*)(.*);", line):
            name = found[2].split(".")[0]
            instructions.append(_Instruction(name, _shared_bytes(found[2], found[3])))
            target = re.search(r"\.L_x_\d+", found[3])
            if name == "BRA" and target and target[0] in labels:
                branches.append((labels[target[0]], len(instructions)))
            if name == "EXIT" and not found[1]:
                # Behind it lie waits for barriers.
                end = len(instructions)
    loops = [each for each in branches if each[1] <= end and each[1] - each[0] >= _LONG_LOOP]
    return instructions, sorted(loops, key=lambda each: each[0] - each[1])


def _shared_bytes(name: str, operands: str) -> int:
    """Return the bytes of shared memory that a warp reads or writes in the instruction `name`."""
    width = re.search(r"\.U?(8|16|32|64|128)\b", name)
    match name.split(".")[0]:
        case "LDS" | "STS" | "LDGSTS":
            return _WARP * (int(width[1]) // 8 if width else 4)
        case "LDSM" | "STSM":
            # Matrices of 8 x 8 numbers of two bytes.
            matrices = re.search(r"MT?88\.([24])$", name)
            return 128 * (int(matrices[1]) if matrices else 1)
        case "HGMMA":
            # Four warps share rows of 32 bytes: N of the second factor, and 64 of the first one if it is not
            # in registers.
            shape = re.search(r"\.64x(\d+)x", name)
            assert shape is not None, name
            in_registers = re.match(r"\s*R\d+, R\d+,", operands)
            return 32 * (int(shape[1]) + (0 if in_registers else 64)) // 4
    return 0


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """Return the launches of `call`."""
    with recorded_launches() as launches:
        call()
    return launches
