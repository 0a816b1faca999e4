"""How well the model of scaling predicts the published runs.

Runs of the same chip and software are one family. One run of each, that on the fewest GPUs a model, is
the family's calibration, and the others of the family are predicted. The stricter rule has one
calibration for each chip, the first of the table, from which all other runs on that chip are predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks import scaling_model as model
from benchmarks.scaling_model import Forecast, Gradients, Job, Machine, Stages
from cosmoflow_dali.mlperf.published import ROWS, Row
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig

TOLERANCE = 0.2
"""What the project claims of predicted rows: samples/s and time to train off by at most this part."""

NODES = {
    "H100": Machine(gpus=8, cores=112, nvlink=450e9, nvlink_latency=1.9e-6, network=50e9, latency=8.5e-6),
    "A100": Machine(gpus=8, cores=128, nvlink=300e9, nvlink_latency=1.9e-6, network=25e9, latency=8.5e-6),
}
"""The DGX of each chip: NVLink of 900 and 600 GB/s for both ways, a port of NDR 400 and HDR 200 Gbit/s for
each GPU, and the latencies that NCCL (src/graph/tuning.cc, LL128) counts with. Elsewhere four GPUs share a
node; their networks are taken for HDR too."""


@dataclass(frozen=True, slots=True)
class Check:
    """A row and its prediction.

    rate_error, train_error: of samples/s and of the time to train with the epochs that the row took, as
    parts of what was published. table_error: the latter with MLPerf's mean epochs for its batch.
    staging_error: of staging alone. flat_error: that of saying that samples/s stay as calibrated.
    chip_rate_error, chip_train_error: the first two by the calibration of the chip instead of the family's.
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
        """Whether the bar is, where the row is no calibration."""
        return abs(self.rate_error) <= TOLERANCE and (
            bool(self.row.beyond) or abs(self.train_error) <= TOLERANCE
        )

    @property
    def met_by_chip(self) -> bool:
        """Whether it is by the stricter rule, which knows of no exceptions."""
        return max(abs(self.chip_rate_error), abs(self.chip_train_error)) <= TOLERANCE


def gradients() -> Gradients:
    """Those of the reference network."""
    network = CosmoFlow(ReferenceConfig())
    total, last = (sum(p.numel() for p in part.parameters()) for part in (network, network.convs))
    return Gradients(4.0 * total, 4.0 * last)


def calibration(chip: str, stack: str | None = None) -> Row:
    """The row that the figures of the chip, or of the family with this software, come from."""
    fitting = (row for row in ROWS if row.chip == chip and row.stack == (stack or row.stack))
    return next(row for row in fitting if row.calibrates)


def staged(row: Row) -> float:
    """Bytes that a model staged: MXNet's entries converted files, of the training samples alone."""
    if "MXNet" in row.stack:
        return row.copies * model.TRAIN * float(model.RAW)
    return (model.TRAIN + model.VALIDATION) * model.PUBLISHED


def calibrated(known: Row, sent: Gradients) -> tuple[Machine, Stages]:
    """The machine and the stages that the row `known` shows; the input stage hides in these."""
    machine = replace(
        NODES[known.chip],
        gpus=known.gpus,
        staging=staged(known) / known.nodes / known.staging,
        # Nobody has shown more of a site's file system than its runs took.
        file_system=max(
            each.models * staged(each) / each.staging
            for each in ROWS
            if each.site == known.site and each.calibrates
        ),
    )
    compute = model.compute_of(machine, known.nodes, sent, 1 / known.rate)
    return machine, Stages(compute, known.evaluation * known.batch / model.VALIDATION)


def predict(row: Row, known: Row, sent: Gradients, epochs: float) -> tuple[Forecast, float]:
    """What the row ought to have taken, in `epochs` epochs, by what `known` shows; and its minutes."""
    machine, stages = calibrated(known, sent)
    job = Job(row.nodes, row.batch, epochs, row.models, staged(row))
    found = model.forecast(replace(machine, gpus=row.gpus), stages, sent, job)
    return found, (found.train + (found.staging if row.counted else 0.0)) / 60


def check(row: Row, sent: Gradients) -> Check:
    """The row's prediction."""
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
