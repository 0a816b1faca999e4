"""From a YAML file and flags to one frozen `TrainConfig`, in one hop.

Each part of the configuration is a dataclass that stands beside the code that uses it; this module
only composes them. A YAML file states differences from the defaults, flags state differences from
the YAML, and whatever does not fit is refused here, by key and value, before anything is touched.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from cosmoflow_dali.compute.engines import ComputeConfig
from cosmoflow_dali.compute.optim import AdamConfig, SGDConfig
from cosmoflow_dali.compute.schedule import OneCycleConfig, StepDecayConfig
from cosmoflow_dali.models.build import ModelConfig
from cosmoflow_dali.models.reference import ReferenceConfig
from pipelines.errors import ConfigError, DataError
from pipelines.loading.config import LoaderConfig
from preprocess.simulate import SimulateConfig
from preprocess.staging.config import StageConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT = CONFIGS / "default.yaml"

Tree: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the samples are.

    dir: a folder with `train` and `validation`, in any format the project reads.
    simulate: how to make them where `dir` has none; without it they must be there.
    stage: where each node keeps a copy of its own to train from; without it, all read `dir`.
    """

    dir: str = "data"
    simulate: SimulateConfig | None = None
    stage: StageConfig | None = None


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How often the run speaks and saves.

    every: steps between lines of metrics.jsonl; every such step the ranks compare notes.
    checkpoint_every: steps between checkpoints; each epoch ends with one whatever this says.
    """

    every: int = 10
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1 step")


@dataclass(frozen=True, slots=True)
class SubmissionConfig:
    """What the MLPerf log says of who ran this and under which rules."""

    org: str = "unknown"
    platform: str = "unknown"
    division: Literal["closed", "open"] = "closed"
    status: Literal["cloud", "onprem", "preview", "research"] = "research"


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that decides a run.

    seed: at least 0; None is drawn at the start, and shared and logged.
    global_batch: samples a step on all ranks, which the learning rates were tuned for; None for any.
    epochs: passes over the training split.
    shuffle: a new order of all training samples each epoch, instead of file order.
    symmetries: turn each global batch by one of the cube's 48 symmetries.
    target_mae: training ends with the epoch whose validation MAE is at or below it.
    baseline: fit a ridge regression to the same universes, to compare with.
    device: "auto" trains on a GPU where there is one.
    """

    data: DataConfig = field(default_factory=DataConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    model: ModelConfig = field(default_factory=ReferenceConfig)
    optimizer: SGDConfig | AdamConfig = field(default_factory=SGDConfig)
    schedule: StepDecayConfig | OneCycleConfig = field(default_factory=StepDecayConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    submission: SubmissionConfig = field(default_factory=SubmissionConfig)
    seed: int | None = None
    global_batch: int | None = None
    epochs: int = 50
    shuffle: bool = False
    symmetries: bool = False
    target_mae: float | None = None
    baseline: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError("seed", self.seed, "must be at least 0 and below 2**63")
        if self.epochs < 1:
            raise ConfigError("epochs", self.epochs, "must be at least 1")
        if self.target_mae is not None and self.target_mae <= 0:
            raise ConfigError("target_mae", self.target_mae, "must be above 0")
        decay = self.optimizer.weight_decay if isinstance(self.optimizer, SGDConfig) else 0.0
        dropout = self.model.dropout if isinstance(self.model, ReferenceConfig) else 0.0
        if decay > 0 and dropout > 0:
            raise ConfigError(
                "optimizer.weight_decay",
                decay,
                f"cannot go together with model.dropout = {dropout}; set one of them to 0",
            )
        micro, batch = self.compute.micro_batch, self.loader.batch_size
        if micro is not None and batch % micro:
            raise ConfigError("compute.micro_batch", micro, f"must divide loader.batch_size = {batch}")
        if micro is not None and not isinstance(self.model, ReferenceConfig):
            raise ConfigError(
                "compute.micro_batch", micro, "the open network normalises over its batch; leave it out"
            )
        simulate = self.data.simulate
        if simulate is not None and simulate.size != self.model.size:
            raise ConfigError("model.size", self.model.size, f"data.simulate.size is {simulate.size}")


def read_yaml(path: Path) -> Tree:
    """The mapping in the YAML file at `path`; DataError where there is none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))
        raise DataError(path, f"cannot be read ({error.strerror})", f"configs/ has {names}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(path, f"is not YAML ({reason})", "mend the file") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise DataError(path, f"holds a {type(tree).__name__}", "expected `key: value` lines")
    return tree


def resolve(tree: Tree, flags: Mapping[str, Any] | None = None) -> tuple[TrainConfig, list[str]]:
    """The configuration of YAML `tree` under `flags` (dotted key to value), and notes to print.

    Weight decay given without a dropout turns dropout off, which a note says.
    """
    flags = dict(flags or {})
    merged, notes = _copy(tree), []
    for key, value in flags.items():
        _set(merged, key, value)
    if _flat(merged).get("optimizer.implementation") == "foreach":
        # Configurations and checkpoints of earlier versions may have it.
        _set(merged, "optimizer.implementation", "fused")
        notes.append("optimizer.implementation foreach was removed; using fused, which is the same rule")
    if _flat(merged).get("model.kind", "reference") == "reference":
        # The flags decide if they speak of either, else the file does.
        for given in (flags, _flat(tree)):
            if "model.dropout" in given:
                break
            if given.get("optimizer.weight_decay"):
                _set(merged, "model.dropout", 0.0)
                notes.append("weight decay is given without a dropout, so dropout is off")
                break
    return _build(TrainConfig, merged, ""), notes


def to_tree(config: TrainConfig) -> Tree:
    """`config` as plain mappings and lists, which `resolve` turns into it again."""
    return typing.cast(Tree, _plain(config))


def flatten(config: TrainConfig) -> dict[str, Any]:
    """`config` by dotted key."""
    return _flat(to_tree(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _flat(tree: Tree, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _copy(tree: Tree) -> Tree:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}


def _set(tree: Tree, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(name, child, "expected `key: value` lines below it")
        tree = child
    tree[last] = value


def _build(cls: Any, tree: Tree, prefix: str) -> Any:
    """An instance of dataclass `cls` from `tree`, whose keys are called `prefix` + key."""
    known = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"{prefix}{key}", value, f"unknown key; {way_out}")
        values[key] = _convert(known[key], value, f"{prefix}{key}")
    for item in dataclasses.fields(cls):
        if item.name not in values and item.default is item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{item.name}", None, "is required")
    try:
        return cls(**values)
    except ConfigError as error:
        # A nested class names its own field only.
        raise ConfigError(f"{prefix}{error.key}", error.value, error.remedy) from None


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value`, as YAML or a flag gives it, as the annotation `kind` wants it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and value is None:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        return _convert(choices[0] if len(choices) == 1 else _by_kind(choices, value, key), value, key)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(key, value, "expected `key: value` lines below it")
        return _build(kind, value, f"{key}.")
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(key, value, f"must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(key, value, "expected a list")
        return tuple(_convert(arguments[0], item, key) for item in value)
    if kind is float:
        # YAML reads 1e-3 as text, for want of a dot.
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        if number is None or number != number or abs(number) == float("inf"):
            raise ConfigError(key, value, "expected a finite number")
        return number
    if type(value) is not kind:
        names = {int: "a whole number", bool: "true or false", str: "text"}
        raise ConfigError(key, value, f"expected {names[kind]}")
    return value


def _by_kind(choices: list[Any], value: Any, key: str) -> Any:
    """The dataclass among `choices` that the mapping's `kind` names; the first without one."""
    kinds = {typing.get_args(typing.get_type_hints(choice)["kind"])[0]: choice for choice in choices}
    if not isinstance(value, dict) or "kind" not in value:
        return choices[0]
    if value["kind"] not in kinds:
        raise ConfigError(f"{key}.kind", value["kind"], f"must be one of {', '.join(kinds)}")
    return kinds[value["kind"]]
