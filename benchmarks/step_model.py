"""A model of the time of a training step on GPUs: the operations that a step launches, and fixed rates.

The step is that of the reference network at 128^3, batch 1, bfloat16, with Triton's kernels. It runs on
torch's meta device, which computes shapes only, so every operation and every launch of a kernel is counted as
the program makes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.aot import Launch, compile_launch, recorded_launches
from cosmoflow_dali.models.reference import Block, CosmoFlow, ReferenceConfig
from cosmoflow_dali.models.triton_block import first_block
from cosmoflow_dali.models.triton_pool import pool_block
from pipelines.formats.packed.gather_triton import gather

_TENSOR_CORE_SHARE, _BANDWIDTH_SHARE = 0.6, 0.85
"""Shares of the data sheet's rates that a good kernel reaches."""

_NODE = 3e-6
"""Seconds between two nodes of a CUDA graph."""

_ISSUES = 4
"""Instructions that a multiprocessor issues in a cycle."""

_SHARED = 128
"""Bytes that a multiprocessor reads or writes in shared memory in a cycle."""

_NO_KERNEL = "empty", "empty_like", "new_empty", "_unsafe_view", "detach"
"""Operations of torch that launch nothing, beside views."""


@dataclass(frozen=True)
class Chip:
    """Rates of a GPU from its data sheet.

    Attributes:
        architecture: As in sm_90.
        multiprocessors: Their number.
        clock: Cycles per second.
        flops: Dense half-precision operations per second of the tensor cores.
        bandwidth: Bytes per second of the memory.
    """

    name: str
    architecture: int
    multiprocessors: int
    clock: float
    flops: float
    bandwidth: float


CHIPS = (
    Chip("A100", 80, 108, 1.41e9, 312e12, 2.039e12),
    Chip("H100", 90, 132, 1.755e9, 989e12, 3.35e12),
    Chip("H200", 90, 132, 1.755e9, 989e12, 4.8e12),
    Chip("B200", 100, 148, 1.85e9, 2250e12, 8.0e12),
)
"""SXM variants. The clocks are those under load."""


@dataclass(frozen=True)
class Node:
    """A node of the step's CUDA graph: a kernel.

    Attributes:
        flops: Operations of tensor cores.
        bytes: Memory traffic.
        issued: Instructions of all warps by architecture, where they are known.
        shared: Bytes that all warps read and write in shared memory, likewise.
    """

    flops: float = 0.0
    bytes: float = 0.0
    issued: dict[int, float] = field(default_factory=dict)
    shared: dict[int, float] = field(default_factory=dict)

    def times(self, chip: Chip) -> dict[str, float]:
        """Return the seconds that each resource of `chip` needs."""
        cycles = chip.multiprocessors * chip.clock
        return {
            "tensor cores": self.flops / (_TENSOR_CORE_SHARE * chip.flops),
            "memory": self.bytes / (_BANDWIDTH_SHARE * chip.bandwidth),
            "instructions": self.issued.get(chip.architecture, 0.0) / (_ISSUES * cycles),
            "shared memory": self.shared.get(chip.architecture, 0.0) / (_SHARED * cycles),
        }


@dataclass(frozen=True)
class Part:
    """A part of a step."""

    name: str
    nodes: tuple[Node, ...]

    def limits(self, chip: Chip) -> dict[str, float]:
        """Return the seconds of this part on `chip`, by the resource that limits them."""
        found = {"launches": _NODE * len(self.nodes)}
        for node in self.nodes:
            times = node.times(chip)
            limit = max(times, key=times.__getitem__)
            found[limit] = found.get(limit, 0.0) + times[limit]
        return dict(sorted(found.items(), key=lambda item: -item[1]))


class Work(NamedTuple):
    """Work of a launch.

    Attributes:
        flops: Operations of tensor cores.
        bytes: Memory traffic.
        trips: Iterations of each loop of the source, the outermost first.
        outputs: Elements of its output.
    """

    flops: float
    bytes: float
    trips: tuple[int, ...]
    outputs: int


def kernel_work(launch: Launch) -> Work:
    """Return the work of `launch` by formula."""
    given, moved = launch.arguments, float(launch.bytes)
    match launch.name:
        case "triton_block.forward" | "triton_block.backward":
            # Four voxels of a cell, or two in each of two programs, and three planes of its window.
            window, columns = 16 * given["CHANNELS"], 2 * given["FILTERS"]
            flops = 4 * 3 * 2.0 * window * columns * given["cells"]
            outputs = given["cells"] * given["FILTERS"]
            if launch.name == "triton_block.forward":
                return Work(flops, moved, (4,), outputs)
            rounds = math.ceil(given["cells"] / (given["CELLS"] * given["PROGRAMS"]))
            return Work(flops, moved, (rounds, 2), outputs)
        case "triton_pool.forward":
            return Work(0.0, moved, (), given["count"])
        case "triton_pool.backward":
            rounds = math.ceil(given["count"] / (given["ELEMENTS"] * given["PROGRAMS"]))
            return Work(0.0, moved, (rounds,), given["count"])
        case "gather_triton.gather":
            return Work(0.0, moved, (), given["written"].numel())
        case "gather_triton.count":
            return Work(0.0, moved, (), given["voxels"])
    raise ValueError(f"the work of {launch.name} is not known")


class _Recorder(TorchDispatchMode):
    """Adds the operations of torch to the current part."""

    def __init__(self) -> None:
        super().__init__()
        self.current = ""
        self.parts: dict[str, list[Node]] = {}

    def add(self, node: Node, times: int = 1) -> None:
        """Add `times` nodes to the current part."""
        self.parts.setdefault(self.current, []).extend([node] * times)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `function` and add its nodes."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name in _NO_KERNEL:
            return result
        moved = _bytes(args) + _bytes(kwargs) + _bytes(result)
        count = flop_registry.get(function.overloadpacket)
        flops = float(count(*args, **(kwargs or {}), out_val=result)) if count else 0.0
        if name == "convolution_backward":
            # The gradients of input and kernel are separate kernels; both read that of the output.
            self.add(Node(flops / 2, (moved + _bytes(args[0])) / 2), 2)
        else:
            # Padding fills its result first.
            self.add(Node(flops, moved), 1)
            if name == "constant_pad_nd":
                self.add(Node(bytes=_bytes(result)))
        return result


def _bytes(tree: Any) -> int:
    """Return the bytes of all tensors in `tree`."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _recorded(recorder: _Recorder, part: str) -> Iterator[None]:
    """Add the body's operations and launches to `part`."""
    before, recorder.current = recorder.current, part
    with recorded_launches() as launches:
        yield
    for launch in launches:
        work = kernel_work(launch)
        issued, shared = {}, {}
        for architecture in sorted({chip.architecture for chip in CHIPS}):
            code = compile_launch(launch, architecture)
            warps = float(code.warps * launch.programs)
            issued[architecture] = warps * code.executed(work.trips)
            shared[architecture] = warps * code.moved(work.trips)
        recorder.add(Node(work.flops, work.bytes, issued, shared))
    recorder.current = before


def model_step() -> list[Part]:
    """Return the parts of a step of the reference network at 128^3, batch 1, bfloat16."""
    recorder = _Recorder()
    # Autocast's copies of the weights; the step's own are float32.
    model = CosmoFlow(ReferenceConfig()).to("meta", torch.bfloat16)
    functions: list[Block] = [first_block, *([pool_block] * (model.config.blocks - 1))]
    # Of each block the result, and the leaf that later blocks read in its place, so that each is a part.
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recording(number: int) -> Block:
        def block(*inputs: torch.Tensor) -> torch.Tensor:
            with _recorded(recorder, f"block {number + 1} forward"):
                result = functions[number](*inputs)
            results.append((result, result.detach().requires_grad_()))
            return results[-1][1]

        return block

    model.blocks = [recording(number) for number in range(model.config.blocks)]
    size = model.config.size
    volume = torch.empty(size, size, size, 4, dtype=torch.bfloat16, device="meta")
    symbols = torch.empty(size**3, dtype=torch.uint8, device="meta")
    escapes = torch.empty(2, size**3 // 8, dtype=torch.uint8, device="meta")
    with recorder:
        with _recorded(recorder, "gather"):
            # The measured average: one voxel in nine has an escape, in a table of some 40,000 rows.
            table = torch.empty(40_000, 4, device="meta")
            gather(symbols, escapes, table, volume, byte_sum=0, by_mean=False)
        recorder.current = "dense layers and loss"
        prediction = model(volume[None].permute(0, 4, 1, 2, 3))
        functional.mse_loss(prediction.float(), torch.empty(1, 4, device="meta")).backward()
        for number, (result, leaf) in reversed(list(enumerate(results))):
            with _recorded(recorder, f"block {number + 1} backward"):
                result.backward(leaf.grad)
    sizes = [parameter.numel() for parameter in model.parameters()]
    recorder.current = "casts of weights and gradients"
    for numbers in sizes:
        recorder.add(Node(bytes=6.0 * numbers), 2)
    recorder.current = "optimizer"
    # Weight and momentum are read and written, the gradient is read. Two launches take all tensors.
    recorder.add(Node(bytes=5 * 4.0 * sum(sizes) / 2), 2)
    return [Part(name, tuple(nodes)) for name, nodes in recorder.parts.items()]
