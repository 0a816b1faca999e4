"""Command line of the trainer: flags over a YAML file over defaults."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosmoflow_dali.config import DEFAULT, TrainConfig, read_yaml, resolve
from cosmoflow_dali.training import run_dir as runs
from pipelines.distributed.cli import OneLineParser, local_path
from pipelines.errors import ConfigError
from pipelines.settings import flag_options, settings
from pipelines.strict_yaml import parse_yaml

FLAGS = {
    "--seed": "seed",
    "--initial-lr": "schedule.initial_lr",
    "--base-lr": "schedule.base_lr",
    "--weight-decay": "optimizer.weight_decay",
    "--dropout": "model.dropout",
    "--warmup-epochs": "schedule.warmup_epochs",
    "--lr-scheduler-epochs": "schedule.decay_epochs",
    "--lr-scheduler-decays": "schedule.decay_factors",
    "--shuffle": "shuffle",
    "--epochs": "epochs",
    "--batch-size": "loader.batch_size",
    "--spatial": "parallel.spatial",
    "--target-mae": "target_mae",
    "--data-dir": "data.dir",
}
"""Setting that each flag sets; type and help come from the setting's declaration."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """Parsed command line.

    Args:
        config: Resolved configuration.
        run_dir: Folder of the run; if not given, one named after the configuration and the time.
        must_be_new: The run gets a new folder, with a number appended to the name if `run_dir` exists.
        resume: Continue the run in `run_dir`.
        instances: Number of training instances that the ranks are divided into.
        caches_cleared: The page caches were cleared just before.
        staged_since: Start of staging in a job step before this program, in Unix ms.
        profile: Steps to record for a trace, counted from 1 on.
    """

    config: TrainConfig
    run_dir: Path
    must_be_new: bool
    resume: bool
    instances: int = 1
    caches_cleared: bool = False
    staged_since: int | None = None
    profile: range = range(0)


def parse(argv: Sequence[str] | None) -> Arguments:
    """Parse `argv`, by default the process's arguments; raise UserError if they are invalid."""
    values = vars(_parser().parse_args(argv))
    run_dir, resume, instances = values["run_dir"], values["resume"], values["instances"]
    if resume and run_dir is None:
        raise ConfigError("--resume", True, "also give --run-dir, the folder of the run to resume")
    if instances > 1 and run_dir is None:
        raise ConfigError("--instances", instances, "also give --run-dir, which gets a folder for each")
    path: Path = values["config"] or DEFAULT
    if resume and values["config"] is None and (run_dir / runs.CONFIG).exists():
        path = run_dir / runs.CONFIG
    flags = {key: values[key] for key in FLAGS.values() if key in values}
    config = resolve(read_yaml(path), flags | dict(map(_parse_setting, values["set"])))
    since = values["staged_since"]
    if since is not None and config.data.stage is None:
        raise ConfigError("--staged-since", since, "nothing is staged without data.stage.dir")
    profile = range(0) if values["profile"] is None else _parse_steps(values["profile"])
    if profile and config.compute.nvtx:
        raise ConfigError("--profile", values["profile"], "set compute.nvtx to false; torch does one of both")
    folder = run_dir or Path("runs") / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Arguments(
        config, folder, run_dir is None, resume, instances, values["caches_cleared"], since, profile
    )


def select_instance(arguments: Arguments, instance: int) -> Arguments:
    """Return the arguments of training instance number `instance`, from 0: its seed and run folder."""
    if arguments.instances == 1:
        return arguments
    config = arguments.config
    if config.seed is not None:
        config = replace(config, seed=config.seed + instance)
    return replace(arguments, config=config, run_dir=arguments.run_dir / str(instance + 1))


def _parse_steps(text: str) -> range:
    """Return the steps of `FIRST:LAST`."""
    found = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError("--profile", text, "expected FIRST:LAST, such as 20:25, counted from 1 on")
    return range(first, last + 1)


def _parse_setting(text: str) -> tuple[str, Any]:
    """Return key and value of `KEY=VALUE`, with the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError("--set", text, "expected KEY=VALUE, such as loader.threads=4")
    try:
        return key, parse_yaml(value)
    except ValueError as error:
        raise ConfigError("--set", text, f"the value is not valid YAML ({error})") from error


def _parser() -> argparse.ArgumentParser:
    text = "Train CosmoFlow. Flags override the configuration file, which overrides the defaults."
    parser = OneLineParser("cosmoflow_dali.train", text)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML file (default: configs/default.yaml)")
    known = {setting.key: setting for setting in settings(TrainConfig)}
    for flag, key in FLAGS.items():
        add(flag, dest=key, default=argparse.SUPPRESS, **flag_options(known[key]))
    add("--run-dir", type=local_path, metavar="DIR", help="folder of the run (default: runs/NAME-TIME)")
    text = "any setting in docs/settings.md, such as loader.threads=4; may be repeated"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = "divide the ranks evenly among N instances of the training, in folders 1 to N of --run-dir, with "
    add("--instances", type=int, default=1, metavar="N", help=text + "consecutive seeds")
    add("--caches-cleared", action="store_true", help="log that the page caches were cleared for this run")
    text = "log that staging began at this time (Unix ms), in a job step before this one"
    add("--staged-since", type=int, metavar="MS", help=text)
    text = "record these steps on rank 0 and write a trace for ui.perfetto.dev into the run's folder"
    add("--profile", metavar="FIRST:LAST", help=text)
    text = "resume the run in --run-dir from its newest checkpoint; start it if there is none"
    add("--resume", action="store_true", help=text)
    return parser
