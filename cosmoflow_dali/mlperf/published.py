"""Published results of CosmoFlow in MLPerf HPC, for comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A published result with one sample per GPU, from the result logs in mlcommons/hpc_results_<version>.

    Attributes:
        stack: Submitter of the software and its framework.
        site: System whose file system was used.
        source: Entry, as <submitter>/<system>/<scaling>.
        nodes, gpus: Nodes of each model, and GPUs of each node.
        models: Models trained side by side.
        rate: Training samples per second of each GPU, defined as `parse_logs.Run.rate`.
        evaluation: Seconds of one evaluation.
        epochs: Mean over the runs.
        minutes: Time to train: the mean without the fastest and slowest run, where runs were scored so.
        staging: Seconds.
        copies: Copies of the samples that a model staged; in v1.0 its DATA_SHARD_MULTIPLIER.
        counted: True if `minutes` includes staging.
        whole: Minutes from the first model's start to the last one's end (TTTa), if known.
        calibrates: True if the scaling model takes figures from this row.
        beyond: Reason why that model cannot predict the time to train, if so.
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
    copies: int = 1
    counted: bool = True
    whole: float | None = None
    calibrates: bool = False
    beyond: str = ""

    @property
    def batch(self) -> int:
        """Global batch: one sample per GPU."""
        return self.nodes * self.gpus

    @property
    def accelerators(self) -> str:
        """Number and kind of accelerators, for tables."""
        models = f"{self.models} x " if self.models > 1 else ""
        return f"{models}{self.batch} {self.chip}"

    @property
    def submission(self) -> str:
        """Submitter and round."""
        return f"{self.source.partition('/')[0]} {self.version}"

    @property
    def scaling(self) -> str:
        """Kind of scaling, "strong" or "weak"."""
        return self.source.rpartition("/")[2]

    @property
    def models_per_minute(self) -> float | None:
        """Models trained, divided by `whole`."""
        return self.models / self.whole if self.whole else None


NVIDIA, _MXNET = "NVIDIA PyTorch", "NVIDIA MXNet"
ROWS = [
    Row("H100", NVIDIA, "Eos", "v3.0", "NVIDIA/eos_n256_ngc23.09_pytorch/weak", 4, 8, 59,
        223.0, 5.74, 7.34, 9.97, 292.5, counted=False, whole=12.75, calibrates=True),
    Row("H100", NVIDIA, "Eos", "v3.0", "NVIDIA/eos_n64_ngc23.09_pytorch/strong", 64, 8, 1,
        200.4, 0.378, 22.6, 2.10, 13.3, counted=False),
    Row("A100", NVIDIA, "Selene", "v2.0", "NVIDIA/dgxa100_n512_pytorch/weak", 4, 8, 128,
        131.3, 7.33, 7.55, 22.81, 360.1, calibrates=True),
    Row("A100", NVIDIA, "Selene", "v2.0", "NVIDIA/dgxa100_n64_pytorch/strong", 64, 8, 1,
        116.0, 0.316, 23.0, 3.79, 14.3),
    Row("A100", _MXNET, "Selene", "v1.0", "NVIDIA/dgxa100_n16_ngc21.09_mxnet/strong", 16, 8, 1,
        67.3, 3.48, 18.2, 25.78, 350.5, calibrates=True),
    Row("A100", _MXNET, "Selene", "v1.0", "NVIDIA/dgxa100_n128_ngc21.09_mxnet/strong", 128, 8, 1,
        63.2, 1.41, 34.4, 7.12, 91.6, copies=2),
    Row("A100", _MXNET, "Selene", "v1.0", "NVIDIA/dgxa100_n512_ngc21.09_mxnet/weak", 16, 8, 32,
        67.4, 51.9, 18.0, 40.36, 581.3,
        beyond="an evaluation took 52 s, against 3.5 s for one model alone: v1.0 did not stage its samples"),
    Row("A100", "HelmholtzAI MXNet", "JUWELS", "v1.0", "HelmholtzAI/juwelsbooster_gpu_n512_mxnet1.9/strong",
        128, 4, 1, 49.9, 3.60, 43.0, 19.47, 77.9, copies=2, calibrates=True),
    Row("A100", "HelmholtzAI MXNet", "JUWELS", "v1.0", "HelmholtzAI/juwelsbooster_gpu_n1024_mxnet1.9/strong",
        256, 4, 1, 48.3, 1.17, 69.0, 16.73, 145.2, copies=4),
    Row("A100", "LBNL MXNet", "Perlmutter", "v1.0", "LBNL/perlmutter_10x128x4_ngc21.09_mxnet/weak",
        128, 4, 10, 53.4, 1.26, 33.6, 14.08, 104.1, calibrates=True),
    Row("A100", "LBNL MXNet", "Perlmutter", "v1.0", "LBNL/perlmutter_256x4_ngc21.09_mxnet/strong",
        256, 4, 1, 52.8, 0.563, 37.6, 8.02, 77.9, copies=2),
    Row("A100", "HelmholtzAI PyTorch", "HoreKa", "v2.0", "HelmholtzAI/horeka_gpu_n512_pytorch1.13/strong",
        128, 4, 1, 72.0, 0.315, 21.4, 5.49, 26.5, calibrates=True),
    Row("A100", "HPE+LBNL PyTorch", "Perlmutter", "v3.0", "HPE+LBNL/perlmutter_128x4/strong", 128, 4, 1,
        90.7, 0.689, 22.9, 4.73, 5.2, calibrates=True),
]  # fmt: skip
"""NVIDIA's v3.0 figures were computed from its logs by cosmoflow_dali.results."""
