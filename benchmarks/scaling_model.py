"""What a training step, staging and a whole training cost on so many nodes: a model of few parts.

A step is the slowest GPU's forward and backward pass, or its input where that takes longer, and then
as much of the all-reduce as the backward pass did not hide. The all-reduce is that of NCCL: a
reduce-scatter and an all-gather over a node's NVLink, and between them each GPU's share over the
network, by a ring or by a tree, whichever is faster; a message costs its latency and its bytes. All
wait for the slowest GPU of each step, so steps get longer with the GPUs even where the network is
free. An epoch ends with an evaluation of all validation samples, forward only. How many epochs it
takes is no matter of speed: `EPOCHS` has what MLPerf publishes, and nothing beyond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

TRAIN, VALIDATION = 524_288, 65_536
RAW = 128**3 * 4 * 2
"""Bytes of a sample's counts, 128^3 voxels at four redshifts in int16."""

PUBLISHED = RAW / 5.72
"""Bytes of a sample as published, in gzip; see the benchmark of codings."""

PACKED = RAW / 7.03
"""The same in this project's packed format."""

EPOCHS = {32: 7.85, 64: 18.3, 128: 17.85, 512: 22.8, 1024: 40.0}
"""Mean epochs to the target by global batch, MLPerf HPC's reference convergence points (v3.0)."""

BACKWARD = 2 / 3
"""The backward pass's share of a step: two products of matrices for the forward pass's one."""

NOISE = 0.05
"""How much a GPU's steps vary, as a standard deviation over their mean. Assumed: nobody publishes it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A cluster of equal nodes; rates in bytes/s, latencies in seconds.

    gpus, cores: of a node, the latter its processors'.
    nvlink, nvlink_latency: what a GPU sends to those of its node, and what a message waits.
    network, latency: the same to other nodes.
    disk: what a node's own disk gives and takes; the default is assumed.
    staging: what a node takes from the shared file system. file_system: what that gives to all.
    """

    gpus: int
    cores: int
    nvlink: float
    nvlink_latency: float
    network: float
    latency: float
    disk: float = 25e9
    staging: float = math.inf
    file_system: float = math.inf


@dataclass(frozen=True, slots=True)
class Stages:
    """What a sample costs each stage where nothing else is in its way.

    compute: seconds of a training step, forward and backward, on one GPU.
    forward: seconds of its evaluation.
    decode: seconds of a processor from the file's bytes to a batch. read: bytes from the disk.
    """

    compute: float
    forward: float
    decode: float = 0.0
    read: float = 0.0


@dataclass(frozen=True, slots=True)
class Gradients:
    """Bytes of the gradients, in float32.

    last: of those that are ready last, the convolutions', whose all-reduce nothing is left to hide.
    """

    total: float
    last: float


@dataclass(frozen=True, slots=True)
class Job:
    """Trainings that are alike and run side by side.

    nodes: of each. batch: samples of a step, over all GPUs of a training. epochs: to the target.
    models: how many trainings. staged: bytes that each brings to its nodes' disks, all copies together.
    """

    nodes: int
    batch: int
    epochs: float
    models: int = 1
    staged: float = (TRAIN + VALIDATION) * PUBLISHED


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a job takes; times in seconds.

    step: of which exposed is the all-reduce that nothing hides. bound: the longest part of a step.
    rate: samples a second of each GPU while it trains. steps: of an epoch.
    train: from the first step to the target. staging: before that.
    gpu_hours: of one training, staging included.
    """

    gpus: int
    step: float
    exposed: float
    bound: str
    rate: float
    steps: int
    staging: float
    train: float
    gpu_hours: float


@dataclass(frozen=True, slots=True)
class Projection:
    """What can be done with so many nodes: one model as fast as it goes, or many models at once."""

    nodes: int
    one: Forecast
    one_job: Job
    many: Forecast
    many_job: Job


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """Something that ends scaling: its name, beyond how many GPUs, and why."""

    name: str
    gpus: float
    why: str


def ring_bytes(ranks: int, size: float) -> float:
    """Bytes that each of `ranks` sends in a ring all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def ring(ranks: int, size: float, rate: float, latency: float) -> float:
    """Seconds of a ring all-reduce: twice around, a piece at a time."""
    return ring_bytes(ranks, size) / rate + 2 * (ranks - 1) * latency


def tree(ranks: int, size: float, rate: float, latency: float) -> float:
    """Seconds of NCCL's double binary tree: all bytes once up and once down, and so the latencies."""
    return (2 * size / rate + 2 * math.ceil(math.log2(ranks)) * latency) if ranks > 1 else 0.0


def allreduce(machine: Machine, nodes: int, size: float) -> float:
    """Seconds of an all-reduce of `size` bytes over all GPUs of `nodes` nodes."""
    inside = ring(machine.gpus, size, machine.nvlink, machine.nvlink_latency)
    share = size / machine.gpus
    between = (way(nodes, share, machine.network, machine.latency) for way in (ring, tree))
    return inside + min(between)


def exposed(machine: Machine, nodes: int, gradients: Gradients, compute: float) -> float:
    """Seconds of the all-reduce that a step waits for, of which `compute` are its forward and backward."""
    whole = allreduce(machine, nodes, gradients.total)
    return max(whole - BACKWARD * compute, allreduce(machine, nodes, gradients.last))


def slowest(gpus: int) -> float:
    """The slowest of `gpus` GPUs over their mean: Blom's estimate of the largest of so many normal values."""
    return 1 + NOISE * NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))


def compute_of(machine: Machine, nodes: int, gradients: Gradients, step: float) -> float:
    """The inverse of a step of one sample a GPU: its forward and backward, where that takes longest."""
    waits = slowest(nodes * machine.gpus)
    # What of the all-reduce is exposed is one of two, and the step has the longer.
    whole, last = (allreduce(machine, nodes, size) for size in (gradients.total, gradients.last))
    return min((step - last) / waits, (step - whole) / (waits - BACKWARD))


def staging(machine: Machine, job: Job) -> float:
    """Seconds until all samples are where they are read: a node's own share, or what all nodes ask for."""
    own = job.staged / job.nodes / min(machine.staging, machine.disk)
    return max(own, job.models * job.staged / machine.file_system)


def forecast(machine: Machine, stages: Stages, gradients: Gradients, job: Job) -> Forecast:
    """What `job` takes."""
    gpus = job.nodes * machine.gpus
    local = job.batch / gpus
    reading = stages.read * machine.gpus / machine.disk
    decoding = stages.decode * machine.gpus / machine.cores
    parts = {
        "compute": local * stages.compute * slowest(gpus),
        "decoding": local * decoding,
        "the disk": local * reading,
    }
    waited = exposed(machine, job.nodes, gradients, local * stages.compute)
    step = max(parts.values()) + waited
    evaluation = math.ceil(VALIDATION / gpus) * max(stages.forward, decoding, reading)
    steps = math.ceil(TRAIN / job.batch)
    train = job.epochs * (steps * step + evaluation)
    before = staging(machine, job)
    parts["the all-reduce"] = waited
    return Forecast(
        gpus=gpus,
        step=step,
        exposed=waited,
        bound=max(parts, key=parts.__getitem__),
        rate=local / step,
        steps=steps,
        staging=before,
        train=train,
        gpu_hours=gpus * (before + train) / 3600,
    )


def jobs(machine: Machine, nodes: int) -> list[Job]:
    """A training for each global batch known to converge, on as many of `nodes` as can share it."""
    found = []
    for batch, epochs in EPOCHS.items():
        fitting = [count for count in range(1, nodes + 1) if batch % (count * machine.gpus) == 0]
        if fitting:
            found.append(Job(fitting[-1], batch, epochs))
    return found


def project(machine: Machine, stages: Stages, gradients: Gradients, nodes: int) -> Projection:
    """What `nodes` nodes can do."""
    trainings = [(forecast(machine, stages, gradients, job), job) for job in jobs(machine, nodes)]
    one, one_job = min(trainings, key=lambda pair: pair[0].staging + pair[0].train)
    # The smallest batch takes the fewest epochs.
    smallest = trainings[0][1]
    many_job = replace(smallest, models=nodes // smallest.nodes)
    return Projection(nodes, one, one_job, forecast(machine, stages, gradients, many_job), many_job)


def bottlenecks(machine: Machine, stages: Stages, gradients: Gradients) -> list[Bottleneck]:
    """What ends scaling, first the first; a part breaks where it costs as much as what it serves."""
    most = max(EPOCHS)
    small = jobs(machine, min(EPOCHS) // machine.gpus)[0]
    alone = forecast(machine, stages, gradients, small)
    models = 1.0 if alone.staging >= alone.train else alone.train * machine.file_system / small.staged
    doublings = (1 << power for power in range(24))
    spoilt = next((nodes for nodes in doublings if _spoilt(machine, stages, gradients, nodes)), None)
    found = [
        Bottleneck(
            "convergence",
            most,
            f"no global batch above {most} has been published to reach the target: with a sample each, more"
            " GPUs have to share samples or to train several models",
        ),
        Bottleneck(
            "shared file system",
            models * alone.gpus,
            f"models of {alone.gpus} GPUs side by side stage for as long as they train,"
            f" {alone.train / 60:.1f} min: it gives {machine.file_system / 1e9:.0f} GB/s to all; read once"
            f" and passed on, the data set would take {small.staged / machine.file_system:.0f} s of it",
        ),
        Bottleneck("sample count", TRAIN, f"an epoch of {TRAIN:,} samples is a single step"),
    ]
    if spoilt is not None:
        why = "what the backward pass does not hide of it takes as long as forward and backward"
        found.append(Bottleneck("all-reduce", spoilt * machine.gpus, why))
    return sorted(found, key=lambda each: each.gpus)


def _spoilt(machine: Machine, stages: Stages, gradients: Gradients, nodes: int) -> bool:
    return exposed(machine, nodes, gradients, stages.compute) >= stages.compute
