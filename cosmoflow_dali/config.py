"""Build one frozen `TrainConfig` from a YAML file and command-line flags.

Each part of the configuration is a dataclass next to the code that uses it; this module composes
them. A YAML file lists differences from the defaults, flags list differences from the YAML file.
Unknown keys and invalid values are refused by key and value before a run touches anything.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cosmoflow_dali.compute.augment import Symmetries
from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.optim import AdamConfig, SGDConfig
from cosmoflow_dali.compute.schedule import OneCycleConfig, StepDecayConfig
from cosmoflow_dali.models.build import ModelConfig
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.models.reference import ReferenceConfig
from cosmoflow_dali.posterior.partition import PosteriorConfig
from pipelines import strict_yaml
from pipelines.errors import ConfigError, DataError, check_field
from pipelines.loading.config import LoaderConfig
from pipelines.settings import Tree, build, flatten_tree, set_key
from pipelines.storage.cache import CacheConfig
from pipelines.storage.location import Location, parse_location
from preprocess.simulate import SimulateConfig
from preprocess.staging.config import StageConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT = CONFIGS / "default.yaml"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Location of the samples.

    Args:
        dir: Folder with `train` and `validation`, in any format that the project reads: a path, or a URL
            that begins with s3://, gs://, az:// or https://; see docs/clouds.md.
        simulate: Settings for simulating the samples if `dir` has none.
        stage: Settings for a copy on each node's own disk, from which the node then reads.
        cache: Settings for keeping samples on each node's own disk once they were read; not with `stage`.
    """

    dir: str = "data"
    simulate: SimulateConfig | None = None
    stage: StageConfig | None = None
    cache: CacheConfig | None = None

    def __post_init__(self) -> None:
        if self.stage is not None and self.cache is not None:
            advice = "with data.stage all samples are on the node's disk already; leave one of the two out"
            raise ConfigError("cache.dir", self.cache.dir, advice)
        parse_location(self.dir, "dir")

    @property
    def location(self) -> Location:
        """`dir` as an address."""
        return parse_location(self.dir, "data.dir")


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """Division of the work among the ranks.

    Args:
        spatial: Number of consecutive ranks that share every sample, cut along its first axis; see
            docs/whole-universes.md.
    """

    spatial: int = 1

    def __post_init__(self) -> None:
        check_field(self, "spatial", self.spatial >= 1, "must be at least 1")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Intervals of logging and saving.

    Args:
        every: Steps between lines of metrics.jsonl; at these steps the ranks synchronize.
        checkpoint_every: Steps between checkpoints; a checkpoint is also saved after every epoch.
        trackers: Programs that also get the records of metrics.jsonl: "tensorboard" and "wandb" (Weights &
            Biases), each a package of this name to install; see docs/tracking.md.
    """

    every: int = 10
    checkpoint_every: int = 1000
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("every", "checkpoint_every"):
            check_field(self, name, getattr(self, name) >= 1, "must be at least 1 step")
        once = len(set(self.trackers)) == len(self.trackers)
        check_field(self, "trackers", once, "names one twice; name each once")


@dataclass(frozen=True, slots=True)
class SubmissionConfig:
    """Entries of the MLPerf log about the submission.

    Args:
        org: Submitting organization.
        platform: System that runs the benchmark.
        division: "closed" or "open", the rules that the run follows.
        status: Availability of the system.
    """

    org: str = "unknown"
    platform: str = "unknown"
    division: Literal["closed", "open"] = "closed"
    status: Literal["cloud", "onprem", "preview", "research"] = "research"


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """All settings of a run.

    Args:
        seed: Seed of every random draw, at least 0; drawn and logged if not given.
        global_batch: Samples per step on all ranks for which the learning rates were tuned; any if not given.
        epochs: Passes over the training samples.
        shuffle: Draw a new order of all training samples each epoch; otherwise use file order.
        symmetries: Symmetries of the data, one of which is applied to each global batch: "periodic" for
            permutations of the axes and periodic shifts, which whole simulated boxes have, true for the
            cube's 48 rotations and reflections.
        target_mae: Stop after the first epoch whose validation MAE is at most this.
        baseline: Fit a ridge regression to the same samples for comparison.
        posterior: Settings of the posteriors that are fitted after training, to samples that the network does
            not see; none if not given.
        device: "auto" trains on a GPU if there is one.
    """

    data: DataConfig = field(default_factory=DataConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    model: ModelConfig = field(default_factory=ReferenceConfig)
    optimizer: SGDConfig | AdamConfig = field(default_factory=SGDConfig)
    schedule: StepDecayConfig | OneCycleConfig = field(default_factory=StepDecayConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    submission: SubmissionConfig = field(default_factory=SubmissionConfig)
    seed: int | None = None
    global_batch: int | None = None
    epochs: int = 50
    shuffle: bool = False
    symmetries: Symmetries = False
    target_mae: float | None = None
    baseline: bool = False
    posterior: PosteriorConfig | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        valid = self.seed is None or 0 <= self.seed < 2**63
        check_field(self, "seed", valid, "must be at least 0 and below 2**63")
        check_field(self, "epochs", self.epochs >= 1, "must be at least 1")
        check_field(self, "target_mae", self.target_mae is None or self.target_mae > 0, "must be above 0")
        decay = self.optimizer.weight_decay if isinstance(self.optimizer, SGDConfig) else 0.0
        dropout = self.model.dropout if isinstance(self.model, ReferenceConfig) else 0.0
        if decay > 0 and dropout > 0:
            advice = f"cannot be combined with model.dropout = {dropout}; set one of them to 0"
            raise ConfigError("optimizer.weight_decay", decay, advice)
        micro, batch = self.compute.micro_batch, self.loader.batch_size
        if micro is not None and batch % micro:
            raise ConfigError("compute.micro_batch", micro, f"must divide loader.batch_size = {batch}")
        if micro is not None and not isinstance(self.model, ReferenceConfig):
            advice = "the open network normalizes over its batch; leave it out"
            raise ConfigError("compute.micro_batch", micro, advice)
        blocks = len(self.model.widths) if isinstance(self.model, OpenConfig) else self.model.blocks
        if (checkpointed := self.compute.checkpoint_blocks) > blocks:
            advice = f"must be at most {blocks}, the network's blocks"
            raise ConfigError("compute.checkpoint_blocks", checkpointed, advice)
        multiscale = isinstance(self.model, OpenConfig) and self.model.multiscale
        if multiscale and not self.loader.apply_log:
            advice = "needs the logarithms of counts; set loader.apply_log to true"
            raise ConfigError("model.multiscale", True, advice)
        if self.parallel.spatial > 1:
            self._check_spatial(self.parallel.spatial)
        if self.posterior is not None and self.submission.division == "closed":
            advice = "its rules have the network see all training samples; use open, or leave `posterior` out"
            raise ConfigError("submission.division", "closed", advice)
        simulate = self.data.simulate
        if simulate is not None and simulate.size != self.model.size:
            raise ConfigError("model.size", self.model.size, f"must be data.simulate.size = {simulate.size}")
        if simulate is not None and simulate.crops > 1 and self.symmetries == "periodic":
            advice = (
                f"crops of a box are not periodic; use false, or data.simulate.crops = 1 ({simulate.crops})"
            )
            raise ConfigError("symmetries", self.symmetries, advice)

    def _check_spatial(self, spatial: int) -> None:
        """Raise ConfigError if a setting does not go with samples that `spatial` ranks share."""
        if self.model.size % (2 * spatial):
            advice = f"does not cut model.size = {self.model.size} into slabs of an even number of planes"
            raise ConfigError("parallel.spatial", spatial, advice)
        self.loader.check_slabs()
        for key, value in (("compute.engine", "compile"), ("compute.kernels", "triton")):
            if getattr(self.compute, key.removeprefix("compute.")) == value:
                advice = f"does not compute slabs of samples (parallel.spatial = {spatial}); use auto"
                raise ConfigError(key, value, advice)

    def samples_per_step(self, ranks: int) -> int:
        """Return the global batch of `ranks`.

        Raises:
            ConfigError: They cannot be divided into groups of `parallel.spatial`.
        """
        spatial = self.parallel.spatial
        if ranks % spatial:
            advice = f"does not divide the number of ranks, {ranks}, into groups; change one of them"
            raise ConfigError("parallel.spatial", spatial, advice)
        return self.loader.batch_size * (ranks // spatial)


def read_yaml(path: Path) -> Tree:
    """Return the mapping in the YAML file at `path`; raise DataError if there is none."""
    try:
        tree = strict_yaml.read_yaml(path)
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise DataError(path, f"cannot be read ({error.strerror})", f"configs/ has {names}") from error
    if not isinstance(tree, dict | None):
        raise DataError(path, "contains a value without a key", "expected `key: value` lines")
    return tree or {}


def resolve(tree: Tree, flags: Mapping[str, Any] | None = None) -> TrainConfig:
    """Return the configuration of the YAML `tree`, overridden by `flags` (dotted key to value).

    Log a note if weight decay is given without a dropout, which sets dropout to 0.
    """
    flags, merged = flags or {}, copy.deepcopy(tree)
    for key, value in flags.items():
        set_key(merged, key, value)
    if flatten_tree(merged).get("optimizer.implementation") == "foreach":
        # Configurations and checkpoints of earlier versions may have it.
        set_key(merged, "optimizer.implementation", "fused")
        logger.info("optimizer.implementation foreach was removed; using fused, which is the same rule")
    if "compute.first_block" in flatten_tree(merged):
        del merged["compute"]["first_block"]
        logger.info("compute.first_block was replaced by compute.kernels; using its default unless it is set")
    if flatten_tree(merged).get("model.kind", "reference") == "reference":
        # If the flags set neither, the file decides.
        for given in (flags, flatten_tree(tree)):
            if "model.dropout" in given:
                break
            if given.get("optimizer.weight_decay"):
                set_key(merged, "model.dropout", 0.0)
                logger.info("weight decay is given without a dropout: using model.dropout = 0")
                break
    config: TrainConfig = build(TrainConfig, merged)
    return config


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Return the values of `config` by dotted key."""
    return flatten_tree(dataclasses.asdict(config))
