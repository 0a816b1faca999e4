"""Model of a training step whose samples are cut along D, over the ranks of a group.

A rank computes the convolutions of its slab. Each block after the first receives a plane from either
neighbour, forward, and returns their gradients, backward. Once a slab has an odd number of planes, or after
the last block, the group gathers the volume and every rank computes the rest. What a step does once, whatever
the size of a slab, is not divided: launches of kernels, the weights' update, and what the evaluation of a
sample takes beyond a third of its training step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from benchmarks import scaling_model as model
from benchmarks.scaling_model import BACKWARD, Gradients, Machine, Stages
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.models.reference import ReferenceConfig
from pipelines.errors import ConfigError
from pipelines.sample import PARAMETERS, REDSHIFTS

Cuts = tuple[int, int, int]
"""Parts of a sample along D, H and W. This project cuts along D; others are for a published run."""

_LAUNCH = 3e-6
"""Seconds of a kernel's launch in a CUDA graph, as in step_model.py."""

_LAUNCHES = 80, 8
"""Kernels of a step: of dense layers, casts and optimizer, and of each block, as counted there."""

_UPDATE = 32
"""Bytes of memory traffic for a weight: its cast, its gradient's, and the optimizer's update."""

_TABLE, _CHUNK = 0.025, 65_536
"""Share of the table in a packed sample of 128^3, read by every rank, and voxels of a chunk."""


class Block(NamedTuple):
    """A block of 3^3 convolution, on a volume with `edge` voxels along each axis."""

    inputs: int
    filters: int
    edge: int


class Part(NamedTuple):
    """A block as a rank computes it, on `extent` voxels; `cuts` are 1 after the gather."""

    block: Block
    extent: tuple[int, ...]
    cuts: Cuts


@dataclass(frozen=True, slots=True)
class Network:
    """Shape of a network.

    Attributes:
        blocks: Its convolution blocks.
        weights, convs: Numbers of all weights and of the convolutions'.
        is_open: True for the open network, which has periodic ends, batch normalization and symmetries.
    """

    blocks: tuple[Block, ...]
    weights: int
    convs: int
    is_open: bool

    @classmethod
    def of(cls, config: ReferenceConfig | OpenConfig) -> Network:
        """Return the shape of the network that `config` describes."""
        if isinstance(config, OpenConfig):
            cells = len(REDSHIFTS) if config.multiscale else 0
            inputs = [len(REDSHIFTS), *(width + cells for width in config.widths[:-1])]
            filters, norms, biases = config.widths, 2 * sum(config.widths), 0
            means = sum(config.widths) if config.multiscale else config.widths[-1]
            dense = [means, config.hidden, len(PARAMETERS)]
        else:
            filters = tuple(config.filters * 2**number for number in range(config.blocks))
            inputs, norms, biases = [len(REDSHIFTS), *filters[:-1]], 0, sum(filters)
            dense = [filters[-1] * (config.size // 2**config.blocks) ** 3, *config.dense, len(PARAMETERS)]
        edges = (config.size >> number for number in range(len(filters)))
        blocks = tuple(map(Block, inputs, filters, edges))
        convs = sum(27 * block.inputs * block.filters for block in blocks) + biases
        rest = norms + sum(a * b + b for a, b in pairwise(dense))
        return cls(blocks, convs + rest, convs, isinstance(config, OpenConfig))

    @property
    def gradients(self) -> Gradients:
        """Bytes of the float32 gradients."""
        return Gradients(4.0 * self.weights, 4.0 * self.convs)

    def parts(self, cuts: Cuts) -> list[Part]:
        """Return what a rank computes of each block: a part, or all of it after the gather."""
        parts: list[Part] = []
        for block in self.blocks:
            if any(cut > 1 and block.edge // cut % 2 for cut in cuts):
                cuts = (1, 1, 1)
            parts.append(Part(block, tuple(block.edge // cut for cut in cuts), cuts))
        return parts


REFERENCE = Network.of(ReferenceConfig())
"""The benchmark's network at 128^3, whose step calibrates the rates."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a step on a rank of a group.

    Attributes:
        compute: Of a sample, forward and backward.
        copies: Copying the inputs of blocks between the received planes, and the gradients back.
        halos: Exchanging planes and their gradients.
        gather: Gathering the volume, and summing its gradients; in the open network, averaging means too.
        norms: All-reduces of batch normalization over all ranks.
        symmetry: Exchange of what the turned and shifted slab needs.
        saved: What an overlap of the exchange with the convolution of inner planes would save.
    """

    compute: float
    copies: float
    halos: float
    gather: float
    norms: float
    symmetry: float
    saved: float

    @property
    def exchange(self) -> float:
        """Seconds that a step takes beside its compute, but for the all-reduce of gradients."""
        return self.copies + self.halos + self.gather + self.norms + self.symmetry


def passes(part: Part, fill: float, *, first: bool) -> tuple[float, float, float]:
    """Return the operations of the forward pass, and of the gradients of data and of weights.

    A convolution with fewer than `fill` outputs takes the time of so many. The gradient of the data includes
    the received planes; the first block has none.
    """
    padded = math.prod(size + 2 * (cut > 1) for size, cut in zip(part.extent, part.cuts, strict=True))
    voxels = math.prod(part.extent)
    product = 54.0 * part.block.inputs * part.block.filters
    data = 0.0 if first else product * max(padded, fill / part.block.inputs)
    return product * max(voxels, fill / part.block.filters), data, product * voxels


def operations(network: Network, cuts: Cuts, fill: float = 0.0) -> float:
    """Return the operations of a rank's convolutions for a sample, forward and backward."""
    return sum(sum(passes(part, fill, first=number == 0)) for number, part in enumerate(network.parts(cuts)))


def halo_bytes(part: Part, width: int, *, periodic: bool) -> float:
    """Return the bytes of planes that a rank sends for the input of `part`, of numbers of `width` bytes.

    A rank between others sends two planes. Later axes include the planes that the earlier ones brought.
    """
    sizes, total = list(part.extent), 0
    for axis, cut in enumerate(part.cuts):
        if cut > 1:
            face = math.prod(sizes) // sizes[axis]
            total += (2 if periodic else min(2, cut - 1)) * face
            sizes[axis] += 2
    return float(total * part.block.inputs * width)


def read_share(size: int, group: int) -> float:
    """Return the largest share of a packed sample that a rank of `group` reads, by whole chunks."""
    if group == 1:
        return 1.0
    plane, depth, chunks = size**2, size // group, math.ceil(size**3 / _CHUNK)
    # Beyond the ends are the chunks of the other end.
    ends = [
        ((rank * depth - 1) * plane // _CHUNK, -(-((rank + 1) * depth + 1) * plane // _CHUNK))
        for rank in range(group)
    ]
    most = max(end - start for start, end in ends)
    return min(1.0, _TABLE + (1 - _TABLE) * most / chunks)


def once(machine: Machine, network: Network) -> float:
    """Return the seconds of launches and of the weights' update in a step."""
    shared, each = _LAUNCHES
    return _LAUNCH * (shared + each * len(network.blocks)) + _UPDATE * network.weights / machine.memory


def cost(
    machine: Machine,
    stages: Stages,
    network: Network,
    cuts: Cuts,
    *,
    nodes: int = 1,
    samples: float = 1.0,
    width: int = 2,
) -> Cost:
    """Return the seconds of a step of `samples` samples a group.

    Args:
        stages: Those of the reference network at 128^3 on one GPU.
        nodes: Nodes of the training.
        width: Bytes of a number of the activations.
    """
    known = once(machine, REFERENCE)
    # What an evaluation takes beyond a third of a step would stay too.
    apart = max(known, (stages.forward - (1 - BACKWARD) * stages.compute) / BACKWARD)
    if apart >= stages.compute:
        remedy = f"must exceed {1e3 * apart:.2f}, the launches and the update of weights in a step"
        raise ConfigError("--compute-ms", 1e3 * stages.compute, remedy)
    rate = operations(REFERENCE, (1, 1, 1), machine.fill) / (stages.compute - apart)
    parts = network.parts(cuts)
    group = math.prod(cuts)
    copies = halos = saved = norms = 0.0
    for number, part in enumerate(parts):
        if network.is_open:
            norms += 2 * (model.allreduce(machine, nodes, 8 * part.block.filters) + machine.call)
        if number == 0 or math.prod(part.cuts) == 1:
            continue
        moved = samples * halo_bytes(part, width, periodic=network.is_open)
        exchanged = _send(machine, group, moved)
        copied = 2 * samples * math.prod(part.extent) * part.block.inputs * width / machine.memory
        halos += 2 * exchanged
        copies += 2 * copied
        forward, _, weights = (samples * each / rate for each in passes(part, machine.fill, first=False))
        saved += max(0.0, exchanged + copied + forward - _overlapped(part, machine, rate, samples, exchanged))
        saved += min(exchanged, weights)
    compute = apart - known + once(machine, network) + operations(network, cuts, machine.fill) / rate
    return Cost(
        compute,
        copies,
        halos,
        _gather(machine, network, parts, group, samples * width),
        norms,
        _turn(machine, network, parts[0], group, samples * width),
        saved,
    )


def cut_stages(stages: Stages, found: Cost, size: int, group: int) -> Stages:
    """Return the stages of a sample on a rank of a group, from those of a whole sample of 128^3."""
    share = read_share(size, group) * (size / 128) ** 3
    forward = stages.forward + (1 - BACKWARD) * (found.compute - stages.compute)
    return Stages(found.compute, forward, stages.decode * share, stages.read * share, found.exchange)


def _send(machine: Machine, group: int, size: float) -> float:
    """Return the seconds to send `size` bytes of planes, half of them to either neighbour."""
    if group <= machine.gpus:
        return machine.call + machine.nvlink_latency + size / machine.nvlink
    # Of a node's GPUs the first and the last have one neighbour on another node.
    crossing = size if machine.gpus == 1 else size / 2
    return machine.call + machine.latency + crossing / machine.network


def _overlapped(part: Part, machine: Machine, rate: float, samples: float, exchanged: float) -> float:
    """Return the seconds of the forward pass if the inner planes are computed during the exchange."""
    depth, *others = part.extent
    if depth <= 2:
        return math.inf
    product = 54.0 * part.block.inputs * part.block.filters
    fill = machine.fill / part.block.filters
    inner, outer = (samples * product * max(d * math.prod(others), fill) / rate for d in (depth - 2, 2))
    return max(exchanged, inner) + outer + 2 * _LAUNCH


def _gather(machine: Machine, network: Network, parts: list[Part], group: int, width: float) -> float:
    """Return the seconds of joining the slabs or of averaging their means, forward and backward."""
    if group == 1:
        return 0.0
    whole = next((part.block for part in parts if math.prod(part.cuts) == 1), None)
    last, seconds = network.blocks[-1], 0.0
    if whole is not None or not network.is_open:
        volume = last.filters * (last.edge // 2) ** 3 if whole is None else whole.inputs * whole.edge**3
        # An all-gather is half of a ring; the backward pass is an all-reduce.
        seconds += 1.5 * _ring(machine, group, volume * width) + 2 * machine.call
    if network.is_open:
        seconds += 2 * (_ring(machine, group, last.filters * 2 * width) + machine.call)
    return seconds


def _ring(machine: Machine, group: int, size: float) -> float:
    """Return the seconds of a ring all-reduce of `size` bytes in a group."""
    inside = min(group, machine.gpus)
    between = model.ring(group // inside, size / inside, machine.network, machine.latency)
    return model.ring(inside, size, machine.nvlink, machine.nvlink_latency) + between


def _turn(machine: Machine, network: Network, part: Part, group: int, width: float) -> float:
    """Return the seconds in which a rank sends all but its own share of its slab of the input."""
    if group == 1 or not network.is_open:
        return 0.0
    slab = math.prod(part.extent) * part.block.inputs * width
    inside = min(group, machine.gpus)
    near, far = (inside - 1) / group * slab, (1 - inside / group) * slab
    return max(near / machine.nvlink, far / machine.network) + machine.latency + machine.call
