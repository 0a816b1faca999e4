"""How samples are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.errors import ConfigError
from pipelines.loading.reader import OnBadSample


@dataclass(frozen=True, slots=True)
class LoaderConfig:
    """How samples are loaded.

    batch_size: samples a step on each rank.
    threads: that read files, and decode packed samples on a host; DALI has as many again.
    prefetch: batches that are decoded ahead of the one in use.
    apply_log: give the network log(count + 1); without it, the counts divided by their mean.
    direct_io: read files past the page cache, where the file system lets it: for data sets that do
        not fit there, and would only drive out what does.
    gpu_direct: have DALI read npy files into the GPU's memory (GPUDirect Storage), past the host's.
    on_bad_sample: what to do about a sample that is damaged; see `Reader`. Training takes the next
        sound one in its place, validation leaves it out of the score.
    """

    batch_size: int = 1
    threads: int = 2
    prefetch: int = 2
    apply_log: bool = True
    direct_io: bool = False
    gpu_direct: bool = False
    on_bad_sample: OnBadSample = "fail"

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loader.{name}", getattr(self, name), "must be at least 1")
        if self.gpu_direct and self.on_bad_sample == "skip":
            raise ConfigError(
                "loader.gpu_direct", True, "cannot skip damaged samples: set on_bad_sample: fail"
            )
        if self.gpu_direct and self.direct_io:
            raise ConfigError("loader.gpu_direct", True, "reads past the page cache anyway: drop direct_io")
