"""Validation of the scaling model against the published runs.

Runs of the same chip and software form a family. One run of each family, that on the fewest GPUs per model,
is its calibration; the others are predicted. A stricter rule has one calibration per chip, the first of the
table, and predicts all other runs on that chip. Runs whose samples were cut over nodes are predicted from one
with whole samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from benchmarks import scaling_model as model
from benchmarks import spatial_model as spatial
from benchmarks.scaling_model import Forecast, Gradients, Job, Machine, Stages
from cosmoflow_dali.mlperf.published import ROWS, Row
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig

TOLERANCE = 0.2
"""Target for predicted rows: maximum relative error of samples/s and time to train."""

_H100 = Machine(gpus=8, cores=112, nvlink=450e9, nvlink_latency=1.9e-6, network=50e9, latency=8.5e-6)
_A100 = Machine(gpus=8, cores=128, nvlink=300e9, nvlink_latency=1.9e-6, network=25e9, latency=8.5e-6)
NODES = {
    "H100": replace(_H100, memory=0.85 * 3.35e12, fill=132 * 2048, call=8.4e-6),
    "A100": replace(_A100, memory=0.85 * 2.039e12, fill=108 * 2048, call=8.4e-6),
}
"""The DGX of each chip: NVLink of 900 and 600 GB/s in both directions together, one port of NDR 400 and HDR
200 Gbit/s per GPU, and the latencies of NCCL (src/graph/tuning.cc: LL128, and the base of a ring's simple
protocol). Other sites have four GPUs per node; their networks are assumed to be HDR too. A good kernel
reaches 0.85 of the memory's rate, as in step_model.py. It is assumed that 2,048 outputs, a tile of 64 x 32,
keep a multiprocessor busy."""


@dataclass(frozen=True, slots=True)
class CutRun:
    """A run with cut samples, from the logs in mlcommons/hpc_results_v0.7: means of ten runs' medians.

    Attributes:
        step: Seconds: an epoch of 262,144 samples less its evaluation, over its steps.
        evaluation: Seconds for 65,536 samples.
    """

    nodes: int
    batch: int
    cuts: spatial.Cuts
    step: float
    evaluation: float

    @property
    def samples(self) -> float:
        """Samples of a step of each group of nodes."""
        return self.batch * math.prod(self.cuts) / self.nodes

    @property
    def epoch(self) -> float:
        """Seconds of an epoch with its evaluation."""
        return 262_144 / self.batch * self.step + self.evaluation


CUT_RUNS = (
    CutRun(512, 512, (1, 1, 1), (143.82 - 17.52) / 512, 17.52),
    CutRun(16384, 4096, (4, 1, 1), (10.41 - 2.65) / 64, 2.65),
    CutRun(8192, 512, (4, 4, 1), (62.34 - 14.41) / 512, 14.41),
)
"""Entries fugaku_512xA64FX, fugaku_16384xA64FX and fugaku_8192xA64FX, one process a node, kernels of 2^3."""

FUGAKU = Machine(
    gpus=1, cores=48, nvlink=6.8e9, nvlink_latency=1e-6, network=6.8e9, latency=1e-6, memory=0.85 * 1.024e12
)
"""A node of A64FX: 4 x 256 GB/s of memory and ten ports of 6.8 GB/s, as the entries describe it. The latency
is assumed."""


@dataclass(frozen=True, slots=True)
class Check:
    """Relative errors of a row's prediction.

    Attributes:
        rate_error, train_error: Of samples/s and of the time to train with the epochs of the row.
        table_error: Of the time to train with MLPerf's mean epochs for the row's batch.
        staging_error: Of staging alone.
        flat_error: Of samples/s that stay as calibrated.
        chip_rate_error, chip_train_error: The first two with the chip's calibration instead of the family's.
    """

    row: Row
    rate_error: float
    train_error: float
    table_error: float
    staging_error: float
    flat_error: float
    chip_rate_error: float
    chip_train_error: float

    @property
    def met(self) -> bool:
        """True if the errors are within the tolerance, for rows that are not calibrations."""
        return abs(self.rate_error) <= TOLERANCE and (
            bool(self.row.beyond) or abs(self.train_error) <= TOLERANCE
        )

    @property
    def met_by_chip(self) -> bool:
        """True if the errors are within the tolerance by the stricter rule, without exceptions."""
        return max(abs(self.chip_rate_error), abs(self.chip_train_error)) <= TOLERANCE


def gradients() -> Gradients:
    """Return the sizes of the reference network's gradients."""
    network = CosmoFlow(ReferenceConfig())
    total, last = (sum(p.numel() for p in part.parameters()) for part in (network, network.convs))
    return Gradients(4.0 * total, 4.0 * last)


def calibration(chip: str, stack: str | None = None) -> Row:
    """Return the row that calibrates the chip, or the family of chip and `stack`."""
    fitting = (row for row in ROWS if row.chip == chip and row.stack == (stack or row.stack))
    return next(row for row in fitting if row.calibrates)


def staged(row: Row) -> float:
    """Return the bytes that a model staged; MXNet's entries staged converted training samples only."""
    if "MXNet" in row.stack:
        return row.copies * model.TRAIN * float(model.RAW)
    return (model.TRAIN + model.VALIDATION) * model.PUBLISHED


def calibrated(known: Row, sent: Gradients) -> tuple[Machine, Stages]:
    """Derive machine and stages from the row `known`; its stages include the input."""
    machine = replace(
        NODES[known.chip],
        gpus=known.gpus,
        staging=staged(known) / known.nodes / known.staging,
        # The largest known load of the site's file system.
        file_system=max(
            each.models * staged(each) / each.staging
            for each in ROWS
            if each.site == known.site and each.calibrates
        ),
    )
    compute = model.compute_of(machine, known.nodes, sent, 1 / known.rate)
    return machine, Stages(compute, known.evaluation * known.batch / model.VALIDATION)


def predict(row: Row, known: Row, sent: Gradients, epochs: float) -> tuple[Forecast, float]:
    """Predict `row` with `epochs` epochs from the row `known`; return the forecast and its minutes."""
    machine, stages = calibrated(known, sent)
    job = Job(row.nodes, row.batch, epochs, row.models, staged(row))
    found = model.forecast(replace(machine, gpus=row.gpus), stages, sent, job)
    return found, (found.train + (found.staging if row.counted else 0.0)) / 60


def check(row: Row, sent: Gradients) -> Check:
    """Predict `row` and return the errors."""
    known = calibration(row.chip, row.stack)
    own, minutes = predict(row, known, sent, row.epochs)
    _, table_minutes = predict(row, known, sent, model.EPOCHS[row.batch])
    chip, chip_minutes = predict(row, calibration(row.chip), sent, row.epochs)
    return Check(
        row,
        rate_error=own.rate / row.rate - 1,
        train_error=minutes / row.minutes - 1,
        table_error=table_minutes / row.minutes - 1,
        staging_error=own.staging / row.staging - 1,
        flat_error=known.rate / row.rate - 1,
        chip_rate_error=chip.rate / row.rate - 1,
        chip_train_error=chip_minutes / row.minutes - 1,
    )


def predict_cut(run: CutRun, known: CutRun = CUT_RUNS[0]) -> CutRun:
    """Predict step and evaluation of `run` from those of `known`, which has whole samples."""
    kernels = sum(8 * block.inputs * block.filters + block.filters for block in spatial.REFERENCE.blocks)
    dense = spatial.REFERENCE.weights - spatial.REFERENCE.convs
    sent = Gradients(4.0 * (kernels + dense), 4.0 * kernels)
    compute = model.compute_of(FUGAKU, known.nodes, sent, known.step)
    stages = Stages(compute, known.evaluation * known.batch / model.VALIDATION)
    found = spatial.cost(
        FUGAKU, stages, spatial.REFERENCE, run.cuts, nodes=run.nodes, samples=run.samples, width=4
    )
    own = spatial.cut_stages(stages, found, 128, 1)
    waited = model.exposed(FUGAKU, run.nodes, sent, run.samples * own.compute)
    step = run.samples * own.compute * model.slowest(run.nodes) + found.exchange + waited
    evaluation = model.VALIDATION / run.batch * (own.forward + found.exchange / 2)
    return replace(run, step=step, evaluation=evaluation)
