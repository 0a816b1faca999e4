"""The trainer's command line: flags over YAML over defaults."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cosmoflow_dali.config import DEFAULT, TrainConfig, read_yaml, resolve
from cosmoflow_dali.training import run_dir as runs
from pipelines.distributed.cli import OneLineParser
from pipelines.errors import ConfigError

_KEYS = {
    "seed": "seed",
    "initial_lr": "schedule.initial_lr",
    "base_lr": "schedule.base_lr",
    "weight_decay": "optimizer.weight_decay",
    "dropout": "model.dropout",
    "warmup_epochs": "schedule.warmup_epochs",
    "lr_scheduler_epochs": "schedule.decay_epochs",
    "lr_scheduler_decays": "schedule.decay_factors",
    "shuffle": "shuffle",
    "epochs": "epochs",
    "batch_size": "loader.batch_size",
    "target_mae": "target_mae",
    "data_dir": "data.dir",
}
"""The setting that each flag sets."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What the command line asks for.

    name: of the configuration, for a run folder that nobody has named.
    notes: lines to print about how the configuration came to be.
    caches_cleared: whether somebody has cleared the page caches just before.
    instances: into how many models, side by side, the job's ranks are split.
    staged_since: when a job step before this program began to stage its data, in Unix ms, or None.
    """

    config: TrainConfig
    name: str
    run_dir: Path | None
    resume: bool
    notes: list[str]
    instances: int = 1
    caches_cleared: bool = False
    staged_since: int | None = None


def parse(argv: Sequence[str] | None) -> Arguments:
    """The arguments in `argv`, or in the process's own; UserError names what is wrong with them."""
    values = vars(_parser().parse_args(argv))
    run_dir, resume = values["run_dir"], values["resume"]
    if resume and run_dir is None:
        raise ConfigError("--resume", True, "also give --run-dir, the folder of the run to go on with")
    path: Path = values["config"] or DEFAULT
    if resume and values["config"] is None and (run_dir / runs.CONFIG).exists():
        path = run_dir / runs.CONFIG
    flags: dict[str, Any] = {key: values[flag] for flag, key in _KEYS.items() if values[flag] is not None}
    if "data.dir" in flags:
        flags["data.dir"] = str(flags["data.dir"])
    flags |= dict(map(_setting, values["set"]))
    config, notes = resolve(read_yaml(path), flags)
    since, cleared = values["staged_since"], values["caches_cleared"]
    if since is not None and config.data.stage is None:
        raise ConfigError("--staged-since", since, "nothing is staged without data.stage.dir")
    instances = values["instances"]
    if instances > 1 and run_dir is None:
        raise ConfigError("--instances", instances, "also give --run-dir, which will have a folder for each")
    return Arguments(config, path.stem, run_dir, resume, notes, instances, cleared, since)


def of_model(arguments: Arguments, model: int) -> Arguments:
    """`arguments` for the model number `model`, from 0, of their `instances`."""
    if arguments.instances == 1:
        return arguments
    config, folder = arguments.config, arguments.run_dir
    assert folder is not None
    if config.seed is not None:
        config = replace(config, seed=config.seed + model)
    return replace(arguments, config=config, run_dir=folder / str(model + 1))


def _setting(text: str) -> tuple[str, Any]:
    """The key and the value of `KEY=VALUE`, the value read as YAML."""
    key, separator, value = text.partition("=")
    try:
        if not separator:
            raise ValueError("no =")
        return key, yaml.safe_load(value)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError("--set", text, "expected KEY=VALUE, such as loader.threads=4") from error


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m cosmoflow_dali.train",
        description="Train CosmoFlow. Flags override the configuration file, which overrides the defaults.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a YAML file (default: the embedded data set's)"
    )
    parser.add_argument(
        "--seed", type=int, help="of every random draw, at least 0 (default: drawn and logged)"
    )
    parser.add_argument("--initial-lr", type=float, help="learning rate that warm-up starts from")
    parser.add_argument("--base-lr", type=float, help="learning rate after warm-up, at least --initial-lr")
    parser.add_argument(
        "--weight-decay", type=float, help="L2 of the first two dense layers; instead of dropout"
    )
    parser.add_argument("--dropout", type=float, help="of the dense layers, from 0 to below 1")
    parser.add_argument("--warmup-epochs", type=int, help="epochs from --initial-lr to --base-lr")
    parser.add_argument(
        "--lr-scheduler-epochs",
        type=int,
        nargs="+",
        metavar="E",
        help="epochs from which a decay holds",
    )
    parser.add_argument(
        "--lr-scheduler-decays",
        type=float,
        nargs="+",
        metavar="F",
        help="factors of --base-lr from then on",
    )
    parser.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        help="a new order each epoch, instead of file order",
    )
    parser.add_argument("--epochs", type=int, help="passes over the training samples")
    parser.add_argument("--batch-size", type=int, help="samples a step on each rank")
    parser.add_argument(
        "--target-mae", type=float, help="stop after the epoch whose validation MAE is this low"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="holds train/ and validation/")
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME-TIME)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting of the configuration, such as loader.threads=4; may be given again",
    )
    parser.add_argument(
        "--instances",
        type=int,
        default=1,
        metavar="N",
        help="split the ranks into N models, in folders 1 to N of --run-dir, with seeds in a row",
    )
    parser.add_argument(
        "--caches-cleared", action="store_true", help="log that the page caches were cleared for this run"
    )
    parser.add_argument(
        "--staged-since",
        type=int,
        metavar="MS",
        help="log that staging began then (Unix ms), in a job step before this one",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --run-dir from its newest checkpoint; starts it if it has none",
    )
    return parser
