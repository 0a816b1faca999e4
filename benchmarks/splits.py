"""Splits between data and space by the scaling model: groups of GPUs that share each sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import scaling_model as model
from benchmarks.memory_model import peak_bytes
from benchmarks.recipes import Network as Kind
from benchmarks.scaling_model import Forecast, Job, Machine, Stages
from benchmarks.spatial_model import Cost, Network, cost, cut_stages
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.models.reference import ReferenceConfig
from cosmoflow_dali.reporting.plot_style import INK, SERIES, plot_style

SIZES = 128, 256, 512
"""Edges of samples in voxels."""

GROUPS = 64
"""Groups of a picture, each with one sample."""


@dataclass(frozen=True, slots=True)
class Split:
    """A job whose samples are shared by groups of GPUs.

    Attributes:
        forecast: Its times; `epochs` of the job may be 1.
        cost: Seconds of a step within a group.
        memory: Bytes of a rank in half precision, one sample at a time: activations, weights, their gradients
            and the optimizer's numbers.
    """

    job: Job
    forecast: Forecast
    cost: Cost
    memory: float

    @property
    def samples(self) -> float:
        """Samples of a step of each group."""
        return self.job.batch * self.job.spatial / self.forecast.gpus

    @property
    def rate(self) -> float:
        """Samples per second of all GPUs."""
        return self.forecast.rate * self.forecast.gpus


def network_of(kind: Kind, size: int) -> Network:
    """Return the network for samples of edge `size`: blocks until an edge of 4 is left, as at 128^3."""
    blocks = (size // 4).bit_length() - 1
    if kind == "open":
        return Network.of(OpenConfig(size=size, widths=tuple(8 << number for number in range(blocks))))
    return Network.of(ReferenceConfig(size=size, blocks=blocks))


def splits(
    machine: Machine,
    stages: Stages,
    network: Network,
    *,
    nodes: int,
    epochs: Mapping[int, float],
    spatial: Iterable[int],
) -> Iterator[Split]:
    """Yield each split of `nodes` nodes that divides them, the sample and the batch evenly.

    Args:
        stages: Those of the reference network at 128^3 on one GPU.
        epochs: Epochs to train by global batch.
        spatial: Numbers of GPUs that share a sample.
    """
    gpus, size = nodes * machine.gpus, network.blocks[0].edge
    for batch, count in epochs.items():
        for group in spatial:
            if gpus % group or size % group or batch % (gpus // group):
                continue
            job = Job(nodes, batch, count, spatial=group, size=size)
            samples = batch * group / gpus
            found = cost(machine, stages, network, (group, 1, 1), nodes=nodes, samples=samples)
            slab = cut_stages(stages, found, size, group)
            forecast = model.forecast(machine, slab, network.gradients, job)
            memory = (
                peak_bytes(network, (group, 1, 1), width=2)
                + (16 if network.is_open else 12) * network.weights
            )
            yield Split(job, forecast, found, memory)


def fastest(found: Iterable[Split]) -> list[Split]:
    """Return the split that trains fastest on each number of nodes."""
    best: dict[int, Split] = {}
    for each in found:
        known = best.get(each.job.nodes)
        if known is None or each.forecast.train < known.forecast.train:
            best[each.job.nodes] = each
    return list(best.values())


def show_splits(found: Sequence[Split]) -> None:
    """Print the splits; a star marks the fastest of each number of nodes."""
    best = fastest(found)
    print("times of a step in ms; overlap: what it would gain; a star: the fastest training on so many GPUs")
    print(
        "  GPUs   S batch each    step compute   halos  gather  others all-reduce samples/s overlap   GB"
        "       min"
    )
    for each in found:
        one, inside, job = each.forecast, each.cost, each.job
        others = inside.copies + inside.norms + inside.symmetry
        parts = (inside.halos, inside.gather, others)
        print(
            f"{one.gpus:6} {job.spatial:3} {job.batch:5} {each.samples:4.0f} {1e3 * one.step:7.2f}",
            f"{1e3 * each.samples * inside.compute:7.2f}",
            *(f"{1e3 * part:7.3f}" for part in parts),
            f"{1e3 * one.exposed:10.2f} {each.rate:9.1f} {inside.saved / one.step:7.1%}",
            f"{each.memory / 1e9:4.1f} {one.train / 60:9.3f}{' *' if each in best else ''}",
        )


def gains(machine: Machine, stages: Stages, network: Network, spatial: Sequence[int]) -> Mapping[int, float]:
    """Return the speed of 64 groups by their GPUs, one sample each, relative to single GPUs."""
    steps: dict[int, float] = {}
    for group in (1, *spatial):
        nodes, epochs = GROUPS * group // machine.gpus, {GROUPS: 1.0}
        for each in splits(machine, stages, network, nodes=nodes, epochs=epochs, spatial=[group]):
            steps[group] = each.forecast.step
    return {group: steps[1] / step for group, step in steps.items()}


def draw(machine: Machine, stages: Stages, kind: Kind, spatial: Sequence[int], path: Path) -> None:
    """Draw the gain by GPUs that share a sample, a line for each size of samples, to `path`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

    with plot_style():
        figure = Figure(figsize=(7, 4), layout="constrained", dpi=110)
        axes = figure.subplots()
        for size, color in zip(SIZES, SERIES, strict=False):
            found = gains(machine, stages, network_of(kind, size), spatial)
            axes.plot(
                list(found),
                list(found.values()),
                marker="o",
                color=color,
                label=f"{size}\N{SUPERSCRIPT THREE}",
            )
        axes.plot(spatial, spatial, color=INK, linestyle=":", linewidth=1, label="as many times as GPUs")
        for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            set_scale("log", base=2)
            axis.set_major_formatter(FormatStrFormatter("%g"))
        axes.set_xlabel("GPUs that share each sample")
        axes.set_ylabel("speed relative to one GPU a sample")
        axes.legend()
        figure.savefig(path)
