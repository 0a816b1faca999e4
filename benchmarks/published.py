"""Published runs, and how well the model of scaling predicts them.

One run of each chip and software, that on the fewest GPUs a model, is the calibration of its family; the
others of the family are predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks import scaling_model as model
from benchmarks.scaling_model import Gradients, Job, Machine, Stages
from cosmoflow_dali.model import CosmoFlow, ReferenceConfig

BAR = 0.2
"""What the project claims of predicted rows: samples/s and time to train off by at most this part."""

_GZIP = (model.TRAIN + model.VALIDATION) * model.PUBLISHED
_COUNTS = model.TRAIN * float(model.RAW)
"""MXNet's entries staged converted files, and of these the training samples alone."""


@dataclass(frozen=True, slots=True)
class Row:
    """A published run, one sample a GPU: from the result logs in mlcommons/hpc_results_<version>.

    stack: whose software, and what it stands on. Runs of the same chip and stack are one family.
    site: whose file system. source: the entry, as <submitter>/<system>/<scaling>.
    nodes, gpus: of each model, and of each node. models: side by side.
    rate: samples a second of each GPU, the median over epochs and runs. evaluation: seconds of one.
    epochs: the runs' mean. minutes: to train, the mean without the fastest and slowest, where runs were
    scored so. staging: seconds. staged: bytes for one model; counted: whether the minutes have it.
    calibrates: whether the family's figures are taken from it.
    beyond: why its time to train cannot be predicted, where that is so.
    """

    chip: str
    stack: str
    site: str
    version: str
    source: str
    nodes: int
    gpus: int
    models: int
    rate: float
    evaluation: float
    epochs: float
    minutes: float
    staging: float
    staged: float = _GZIP
    counted: bool = True
    calibrates: bool = False
    beyond: str = ""

    @property
    def batch(self) -> int:
        """Global: a sample for each GPU."""
        return self.nodes * self.gpus

    @property
    def name(self) -> str:
        """For tables."""
        models = f"{self.models} x " if self.models > 1 else ""
        return f"{self.version} {self.stack}, {self.site}: {models}{self.batch} {self.chip}"


NVIDIA, _MXNET = "NVIDIA PyTorch", "NVIDIA MXNet"
ROWS = [
    Row("H100", NVIDIA, "Eos", "v3.0", "NVIDIA/eos_n256_ngc23.09_pytorch/weak", 4, 8, 59,
        223.4, 5.74, 7.34, 10.0, 292.5, counted=False, calibrates=True),
    Row("H100", NVIDIA, "Eos", "v3.0", "NVIDIA/eos_n64_ngc23.09_pytorch/strong", 64, 8, 1,
        200.2, 0.378, 22.6, 2.10, 13.3, counted=False),
    Row("A100", NVIDIA, "Selene", "v2.0", "NVIDIA/dgxa100_n512_pytorch/weak", 4, 8, 128,
        131.3, 7.33, 7.55, 22.81, 360.1, calibrates=True),
    Row("A100", NVIDIA, "Selene", "v2.0", "NVIDIA/dgxa100_n64_pytorch/strong", 64, 8, 1,
        115.4, 0.316, 23.0, 3.79, 14.3),
    Row("A100", _MXNET, "Selene", "v1.0", "NVIDIA/dgxa100_n16_ngc21.09_mxnet/strong", 16, 8, 1,
        67.3, 3.48, 18.2, 25.78, 350.5, _COUNTS, calibrates=True),
    Row("A100", _MXNET, "Selene", "v1.0", "NVIDIA/dgxa100_n128_ngc21.09_mxnet/strong", 128, 8, 1,
        63.2, 1.41, 34.4, 7.12, 91.6, 2 * _COUNTS),
    Row("A100", _MXNET, "Selene", "v1.0", "NVIDIA/dgxa100_n512_ngc21.09_mxnet/weak", 16, 8, 32,
        67.4, 51.9, 18.0, 40.36, 581.3, _COUNTS,
        beyond="an evaluation took 52 s, where one model alone needs 3.5: v1.0 staged none of its samples"),
    Row("A100", "HelmholtzAI MXNet", "JUWELS", "v1.0", "HelmholtzAI/juwelsbooster_gpu_n512_mxnet1.9/strong",
        128, 4, 1, 49.9, 3.60, 43.0, 19.47, 77.9, 2 * _COUNTS, calibrates=True),
    Row("A100", "HelmholtzAI MXNet", "JUWELS", "v1.0", "HelmholtzAI/juwelsbooster_gpu_n1024_mxnet1.9/strong",
        256, 4, 1, 48.3, 1.17, 69.0, 16.73, 145.2, 4 * _COUNTS),
    Row("A100", "LBNL MXNet", "Perlmutter", "v1.0", "LBNL/perlmutter_10x128x4_ngc21.09_mxnet/weak",
        128, 4, 10, 53.4, 1.26, 33.6, 14.08, 104.1, _COUNTS, calibrates=True),
    Row("A100", "LBNL MXNet", "Perlmutter", "v1.0", "LBNL/perlmutter_256x4_ngc21.09_mxnet/strong",
        256, 4, 1, 52.8, 0.563, 37.6, 8.02, 77.9, 2 * _COUNTS),
    Row("A100", "HelmholtzAI PyTorch", "HoreKa", "v2.0", "HelmholtzAI/horeka_gpu_n512_pytorch1.13/strong",
        128, 4, 1, 74.0, 0.315, 21.4, 5.49, 26.5, calibrates=True),
    Row("A100", "HPE+LBNL PyTorch", "Perlmutter", "v3.0", "HPE+LBNL/perlmutter_128x4/strong", 128, 4, 1,
        90.7, 0.689, 22.9, 4.73, 5.2, calibrates=True),
]  # fmt: skip
"""v2.0 and v3.0 staged the published gzip; v1.0's copies are its DATA_SHARD_MULTIPLIER."""

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
    """

    row: Row
    rate_error: float
    train_error: float
    table_error: float
    staging_error: float
    flat_error: float

    @property
    def met(self) -> bool:
        """Whether the bar is, where the row is no calibration."""
        return abs(self.rate_error) <= BAR and (bool(self.row.beyond) or abs(self.train_error) <= BAR)


def gradients() -> Gradients:
    """Those of the reference network."""
    network = CosmoFlow(ReferenceConfig())
    total, last = (sum(p.numel() for p in part.parameters()) for part in (network, network.convs))
    return Gradients(4.0 * total, 4.0 * last)


def calibration(chip: str, stack: str) -> Row:
    """The row that the family's figures come from."""
    return next(row for row in ROWS if (row.chip, row.stack) == (chip, stack) and row.calibrates)


def calibrated(row: Row, sent: Gradients) -> tuple[Machine, Stages]:
    """The machine and the stages of the row's family, as calibrated; the input stage hides in these."""
    known = calibration(row.chip, row.stack)
    machine = replace(
        NODES[row.chip],
        gpus=known.gpus,
        staging=known.staged / known.nodes / known.staging,
        # Nobody has shown more of a site's file system than its runs took.
        file_system=max(
            each.models * each.staged / each.staging
            for each in ROWS
            if each.site == row.site and each.calibrates
        ),
    )
    compute = model.compute_of(machine, known.nodes, sent, 1 / known.rate)
    return machine, Stages(compute, known.evaluation * known.batch / model.VALIDATION)


def check(row: Row, sent: Gradients) -> Check:
    """The row's prediction."""
    machine, stages = calibrated(row, sent)
    job = Job(row.nodes, row.batch, row.epochs, row.models, row.staged)
    own = model.forecast(machine, stages, sent, job)
    table = model.forecast(machine, stages, sent, replace(job, epochs=model.EPOCHS[row.batch]))
    own_minutes, table_minutes = (
        (each.train + (each.staging if row.counted else 0.0)) / 60 for each in (own, table)
    )
    return Check(
        row,
        rate_error=own.rate / row.rate - 1,
        train_error=own_minutes / row.minutes - 1,
        table_error=table_minutes / row.minutes - 1,
        staging_error=own.staging / row.staging - 1,
        flat_error=calibration(row.chip, row.stack).rate / row.rate - 1,
    )
