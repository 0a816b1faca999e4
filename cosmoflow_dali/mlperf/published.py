"""Published results of CosmoFlow in MLPerf HPC, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.strict_yaml import read_yaml


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


NVIDIA = "NVIDIA PyTorch"
"""`Row.stack` of NVIDIA's v2.0 and v3.0 entries."""

ROWS = [Row(**row) for row in read_yaml(Path(__file__).with_suffix(".yaml"))]
"""The rows of published.yaml."""
