"""Settings of the loader."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import ConfigError, check_field
from pipelines.loading.reader import OnBadSample


@dataclass(frozen=True, slots=True)
class LoaderConfig:
    """Loading of samples.

    Args:
        batch_size: Samples per step on each rank.
        threads: Threads that read files, and decode packed samples on a host; DALI uses as many more.
        prefetch: Batches decoded ahead of the one in use.
        requests_ahead: Samples asked for ahead of these threads, because remote storage takes long to answer;
            0 for none. If not given, none of local files, and of remote ones as many as the measured latency
            and rate need.
        apply_log: Use log(count + 1) as input; otherwise the counts divided by their mean.
        direct_io: Bypass the page cache where the file system supports it; for data sets larger than memory.
        gpu_direct: Let DALI read npy files directly into GPU memory (GPUDirect Storage).
        on_bad_sample: "fail" stops at a damaged sample. "skip" replaces it by the next valid one in training
            and leaves it out of validation scores.
    """

    batch_size: int = 1
    threads: int = 2
    prefetch: int = 2
    requests_ahead: int | None = None
    apply_log: bool = True
    direct_io: bool = False
    gpu_direct: bool = False
    on_bad_sample: OnBadSample = "fail"

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "prefetch"):
            check_field(self, name, getattr(self, name) >= 1, "must be at least 1")
        ahead = self.requests_ahead
        check_field(self, "requests_ahead", ahead is None or ahead >= 0, "must be at least 0")
        if self.gpu_direct and self.on_bad_sample == "skip":
            raise ConfigError("gpu_direct", True, "cannot skip damaged samples: set on_bad_sample to fail")
        if self.gpu_direct and self.direct_io:
            raise ConfigError("gpu_direct", True, "bypasses the page cache already: unset direct_io")

    def check_slabs(self) -> None:
        """Raise ConfigError if these settings cannot be used with slabs of samples."""
        if self.gpu_direct:
            raise ConfigError("loader.gpu_direct", True, "reads whole samples: unset it or parallel.spatial")
        if not self.apply_log:
            fault = "the mean of a sample needs all of it: set it to true, or unset parallel.spatial"
            raise ConfigError("loader.apply_log", False, fault)
