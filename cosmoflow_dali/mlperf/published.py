"""What others have published of CosmoFlow in MLPerf HPC, to compare with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """A published result, one sample a GPU: from the result logs in mlcommons/hpc_results_<version>.

    stack: whose software, and what it stands on.
    site: whose file system. source: the entry, as <submitter>/<system>/<scaling>.
    nodes, gpus: of each model, and of each node. models: side by side.
    rate: training samples a second of each GPU, as `mlperf_logs.Run` has it. evaluation: seconds of one.
    epochs: the runs' mean. minutes: to train, the mean without the fastest and slowest, where runs were
    scored so. staging: seconds. copies: of the samples, which a model staged; v1.0's are its
    DATA_SHARD_MULTIPLIER. counted: whether the minutes have the staging.
    whole: minutes from the first model's start to the last one's end (TTTa), where it is known.
    calibrates: whether the scaling model takes figures from it.
    beyond: why that model cannot predict its time to train, where that is so.
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
        """Global: a sample for each GPU."""
        return self.nodes * self.gpus

    @property
    def accelerators(self) -> str:
        """For tables."""
        models = f"{self.models} x " if self.models > 1 else ""
        return f"{models}{self.batch} {self.chip}"

    @property
    def submission(self) -> str:
        """Whose, and in which round."""
        return f"{self.source.partition('/')[0]} {self.version}"

    @property
    def scaling(self) -> str:
        """Which was measured: "strong" or "weak"."""
        return self.source.rpartition("/")[2]

    @property
    def models_per_minute(self) -> float | None:
        """Models trained by `whole`."""
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
        beyond="an evaluation took 52 s, where one model alone needs 3.5: v1.0 staged none of its samples"),
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
"""The v3.0 figures of NVIDIA's are what cosmoflow_dali.results makes of its logs."""
