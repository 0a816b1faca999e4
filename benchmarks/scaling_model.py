"""Model of the time of a training step, of staging and of a training on several nodes.

A step takes the forward and backward pass of the slowest GPU, or its input if that takes longer, and the
part of the all-reduce that the backward pass does not hide. The all-reduce follows NCCL: a reduce-scatter
and an all-gather over a node's NVLink, and between them each GPU's share over the network, by a ring or a
tree, whichever is faster; a message costs its latency and its bytes. All GPUs wait for the slowest one in
each step, so steps take longer with more GPUs even without network cost. An epoch ends with an evaluation of
all validation samples, forward only. The number of epochs does not depend on speed: `EPOCHS` has MLPerf's
published values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

TRAIN, VALIDATION = 524_288, 65_536
RAW = 128**3 * 4 * 2
"""Bytes of a sample's counts: 128^3 voxels at four redshifts in int16."""

PUBLISHED = RAW / 5.72
"""Bytes of a published sample, in gzip; see codec_bench.py."""

PACKED = RAW / 7.03
"""Bytes of a sample in the packed format."""

EPOCHS = {32: 7.85, 64: 18.3, 128: 17.85, 512: 22.8, 1024: 40.0}
"""Mean epochs to the target by global batch, from MLPerf HPC's reference convergence points (v3.0)."""

BACKWARD = 2 / 3
"""Share of the backward pass in a step: two matrix products to one of the forward pass."""

NOISE = 0.05
"""Standard deviation of a GPU's step times relative to their mean. Assumed; no values are published."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A cluster of equal nodes; rates in bytes/s, latencies in seconds.

    Attributes:
        gpus, cores: GPUs and CPU cores of a node.
        nvlink, nvlink_latency: Rate and latency from a GPU to others of its node.
        network, latency: Rate and latency to other nodes.
        disk: Rate of a node's local disk; the default is assumed.
        staging: Rate of a node from the shared file system.
        file_system: Rate of the shared file system to all nodes.
        memory, fill: Rate of a GPU's memory, and outputs of a convolution that keep the GPU busy.
        call: Seconds of an operation between ranks beside those of its messages.
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
    memory: float = math.inf
    fill: float = 0.0
    call: float = 0.0


@dataclass(frozen=True, slots=True)
class Stages:
    """Cost of a sample in each stage alone.

    Attributes:
        compute: Seconds of a training step, forward and backward, on one GPU.
        forward: Seconds of its evaluation.
        decode: CPU seconds from the file's bytes to a batch.
        read: Bytes from the disk.
        exchange: Seconds of a step in which GPUs that share samples exchange parts of them.
    """

    compute: float
    forward: float
    decode: float = 0.0
    read: float = 0.0
    exchange: float = 0.0


@dataclass(frozen=True, slots=True)
class Gradients:
    """Bytes of the float32 gradients.

    Attributes:
        total: Of all gradients.
        last: Of those that are ready last, the convolutions', whose all-reduce cannot be hidden.
    """

    total: float
    last: float


@dataclass(frozen=True, slots=True)
class Job:
    """Equal trainings side by side.

    Attributes:
        nodes: Nodes of each training.
        batch: Samples of a step over all GPUs of a training.
        epochs: Epochs to the target.
        models: Number of trainings.
        staged: Bytes that each training stages to its nodes' disks, including copies.
        spatial, size: GPUs that share each sample, and its edge in voxels; larger ones are as many fewer.
    """

    nodes: int
    batch: int
    epochs: float
    models: int = 1
    staged: float = (TRAIN + VALIDATION) * PUBLISHED
    spatial: int = 1
    size: int = 128


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted times of a job in seconds.

    Attributes:
        step: Time of a step.
        exposed: Its part for the all-reduce that is not hidden.
        bound: Longest part of a step.
        rate: Samples per second of each GPU during training.
        steps: Steps of an epoch.
        staging: Time of staging, before training.
        train: Time from the first step to the target.
        gpu_hours: GPU hours of one training, including staging.
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
    """Forecasts for a number of nodes: one model as fast as possible, or many models at once."""

    nodes: int
    one: Forecast
    one_job: Job
    many: Forecast
    many_job: Job


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A limit of scaling: its name, the number of GPUs up to which it allows scaling, and the reason."""

    name: str
    gpus: float
    why: str


def ring_bytes(ranks: int, size: float) -> float:
    """Return the bytes that each rank sends in a ring all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def ring(ranks: int, size: float, rate: float, latency: float) -> float:
    """Return the seconds of a ring all-reduce: two rounds of the ring in pieces."""
    return ring_bytes(ranks, size) / rate + 2 * (ranks - 1) * latency


def tree(ranks: int, size: float, rate: float, latency: float) -> float:
    """Return the seconds of NCCL's double binary tree: bytes and latencies once up and once down."""
    return (2 * size / rate + 2 * math.ceil(math.log2(ranks)) * latency) if ranks > 1 else 0.0


def allreduce(machine: Machine, nodes: int, size: float) -> float:
    """Return the seconds of an all-reduce of `size` bytes over all GPUs of `nodes` nodes."""
    inside = ring(machine.gpus, size, machine.nvlink, machine.nvlink_latency)
    share = size / machine.gpus
    between = (algorithm(nodes, share, machine.network, machine.latency) for algorithm in (ring, tree))
    return inside + min(between)


def exposed(machine: Machine, nodes: int, gradients: Gradients, compute: float) -> float:
    """Return the seconds of the all-reduce that are not hidden by `compute` seconds of compute."""
    whole = allreduce(machine, nodes, gradients.total)
    return max(whole - BACKWARD * compute, allreduce(machine, nodes, gradients.last))


def slowest(gpus: int) -> float:
    """Return the slowest of `gpus` GPUs relative to their mean, by Blom's estimate for normal values."""
    return 1 + NOISE * NormalDist().inv_cdf((gpus - 0.375) / (gpus + 0.25))


def compute_of(machine: Machine, nodes: int, gradients: Gradients, step: float) -> float:
    """Return the compute time that gives a `step` of one sample per GPU, if compute bounds it."""
    waits = slowest(nodes * machine.gpus)
    # The exposed part of the all-reduce is the larger of two terms.
    whole, last = (allreduce(machine, nodes, size) for size in (gradients.total, gradients.last))
    return min((step - last) / waits, (step - whole) / (waits - BACKWARD))


def staging(machine: Machine, job: Job) -> float:
    """Return the seconds of staging, bounded by a node's share or by the load of all nodes."""
    own = job.staged / job.nodes / min(machine.staging, machine.disk)
    return max(own, job.models * job.staged / machine.file_system)


def forecast(machine: Machine, stages: Stages, gradients: Gradients, job: Job) -> Forecast:
    """Predict the times of `job`."""
    gpus = job.nodes * machine.gpus
    local, crops = job.batch * job.spatial / gpus, (job.size / 128) ** 3
    reading = stages.read * machine.gpus / machine.disk
    decoding = stages.decode * machine.gpus / machine.cores
    parts = {
        "compute": local * stages.compute * slowest(gpus),
        "decoding": local * decoding,
        "the disk": local * reading,
    }
    waited = exposed(machine, job.nodes, gradients, local * stages.compute)
    step = max(parts.values()) + waited + stages.exchange
    # A forward pass exchanges half of what a step does.
    each = max(stages.forward, decoding, reading) + stages.exchange / local / 2
    evaluation = math.ceil(VALIDATION * job.spatial / crops / gpus) * each
    steps = math.ceil(TRAIN / crops / job.batch)
    train = job.epochs * (steps * step + evaluation)
    before = staging(machine, job)
    parts |= {"the all-reduce": waited, "the exchange within groups": stages.exchange}
    return Forecast(
        gpus=gpus,
        step=step,
        exposed=waited,
        bound=max(parts, key=parts.__getitem__),
        rate=job.batch / gpus / step,
        steps=steps,
        staging=before,
        train=train,
        gpu_hours=gpus * (before + train) / 3600,
    )


def jobs(machine: Machine, nodes: int) -> list[Job]:
    """Return a job for each batch that is known to converge, on as many of `nodes` as divide it evenly."""
    found = []
    for batch, epochs in EPOCHS.items():
        fitting = [count for count in range(1, nodes + 1) if batch % (count * machine.gpus) == 0]
        if fitting:
            found.append(Job(fitting[-1], batch, epochs))
    return found


def project(machine: Machine, stages: Stages, gradients: Gradients, nodes: int) -> Projection:
    """Return the forecasts for `nodes` nodes."""
    trainings = [(forecast(machine, stages, gradients, job), job) for job in jobs(machine, nodes)]
    one, one_job = min(trainings, key=lambda pair: pair[0].staging + pair[0].train)
    # The smallest batch takes the fewest epochs.
    smallest = trainings[0][1]
    many_job = replace(smallest, models=nodes // smallest.nodes)
    return Projection(nodes, one, one_job, forecast(machine, stages, gradients, many_job), many_job)


def bottlenecks(machine: Machine, stages: Stages, gradients: Gradients) -> list[Bottleneck]:
    """Return the limits of scaling in order; a part is one once it costs as much as the compute."""
    most = max(EPOCHS)
    small = jobs(machine, min(EPOCHS) // machine.gpus)[0]
    alone = forecast(machine, stages, gradients, small)
    models = 1.0 if alone.staging >= alone.train else alone.train * machine.file_system / small.staged
    doublings = (1 << power for power in range(24))
    compute = stages.compute
    nodes_bound = next((n for n in doublings if exposed(machine, n, gradients, compute) >= compute), None)
    found = [
        Bottleneck(
            "convergence",
            most,
            f"no global batch above {most} is known to reach the target: with one sample each, more GPUs have"
            " to share samples or train several models",
        ),
        Bottleneck(
            "shared file system",
            models * alone.gpus,
            f"models of {alone.gpus} GPUs side by side stage as long as they train,"
            f" {alone.train / 60:.1f} min, at {machine.file_system / 1e9:.0f} GB/s for all; read once and"
            f" broadcast, the data set would take {small.staged / machine.file_system:.0f} s",
        ),
        Bottleneck("sample count", TRAIN, f"an epoch of {TRAIN:,} samples is a single step"),
    ]
    if nodes_bound is not None:
        why = "its part that the backward pass does not hide takes as long as forward and backward"
        found.append(Bottleneck("all-reduce", nodes_bound * machine.gpus, why))
    return sorted(found, key=lambda each: each.gpus)
