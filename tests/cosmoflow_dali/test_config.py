"""YAML and flags to one configuration: what is accepted, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmoflow_dali.arguments import parse
from cosmoflow_dali.config import CONFIGS, flatten, read_yaml, resolve, to_tree
from pipelines.errors import ConfigError, UserError

REFERENCE = ["--config", str(CONFIGS / "reference.yaml")]


def test_the_defaults_are_those_of_the_original_readme() -> None:
    config = flatten(resolve({})[0])
    assert config["seed"] is None
    assert (config["schedule.initial_lr"], config["schedule.base_lr"]) == (0.001, 0.008)
    assert (config["optimizer.weight_decay"], config["model.dropout"]) == (0.0, 0.5)
    assert config["schedule.warmup_epochs"] == 4
    assert config["schedule.decay_epochs"] == [32, 64]
    assert config["schedule.decay_factors"] == [0.25, 0.125]
    assert config["shuffle"] is False


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_resolves_and_survives_being_written_down(path: Path) -> None:
    config, _ = resolve(read_yaml(path))
    assert resolve(to_tree(config))[0] == config


def test_flags_override_the_file() -> None:
    flags = "--base-lr 0.002 --lr-scheduler-epochs 5 6 7 --lr-scheduler-decays 0.5 0.25 0.1"
    arguments = parse([*REFERENCE, *flags.split(), "--batch-size", "2", "--no-shuffle"])
    config = flatten(arguments.config)
    assert config["schedule.base_lr"] == 0.002
    assert config["schedule.decay_epochs"] == [5, 6, 7]
    assert config["schedule.initial_lr"] == 0.001
    assert config["loader.batch_size"] == 2
    assert config["shuffle"] is False


def test_weight_decay_alone_turns_dropout_off_and_says_so() -> None:
    arguments = parse([*REFERENCE, "--weight-decay", "0.02"])
    assert flatten(arguments.config)["model.dropout"] == 0.0
    assert any("dropout" in note for note in arguments.notes)
    assert not parse(REFERENCE).notes


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weight-decay", "0.02", "--dropout", "0.1"], ["weight_decay", "0.02", "dropout"]),
        (["--seed", "-1"], ["seed", "-1", "at least 0"]),
        (["--base-lr", "0.0001"], ["base_lr", "0.0001", "initial_lr"]),
        (["--base-lr", "fast"], ["--base-lr", "fast"]),
        (["--base-lr", "nan"], ["base_lr", "nan"]),
        (["--dropout", "1"], ["dropout", "1.0"]),
        (["--weight-decay", "-1"], ["weight_decay", "-1"]),
        (["--warmup-epochs", "-1"], ["warmup_epochs", "-1"]),
        (["--lr-scheduler-decays", "0.5"], ["decay", "0.5"]),
        (["--lr-scheduler-decays", "0.5", "1.5"], ["decay_factors", "1.5"]),
        (["--epochs", "0"], ["epochs", "0"]),
        (["--batch-size", "0"], ["batch_size", "0"]),
        (["--target-mae", "0"], ["target_mae", "0"]),
        (["--resume"], ["--run-dir"]),
        (["--what"], ["--what"]),
        (["--config", "missing.yaml"], ["missing.yaml", "reference"]),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(flags: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        parse([*REFERENCE, *flags])
    line = str(refusal.value)
    assert "\n" not in line
    for word in said:
        assert word in line


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"epoch": 3}, ["epoch", "3", "epochs"]),
        ({"modell": {}}, ["modell", "model"]),
        ({"loader": {"batch": 3}}, ["loader.batch", "3", "batch_size"]),
        ({"loader": 3}, ["loader", "3"]),
        ({"epochs": "many"}, ["epochs", "many", "whole number"]),
        ({"epochs": 1.5}, ["epochs", "1.5"]),
        ({"epochs": True}, ["epochs", "True"]),
        ({"shuffle": 1}, ["shuffle", "1", "true or false"]),
        ({"model": {"kind": "closed"}}, ["model.kind", "closed", "reference", "open"]),
        ({"device": "tpu"}, ["device", "tpu", "auto"]),
        ({"schedule": {"decay_epochs": 3}}, ["schedule.decay_epochs", "3", "list"]),
        ({"schedule": {"kind": "one_cycle", "base_lr": 0.1}}, ["schedule.base_lr", "peak_lr"]),
        ({"data": {"dir": "d", "simulate": {"size": 32}}}, ["model.size", "128", "32"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tree: dict[str, object], said: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(tree)
    line = str(refusal.value)
    assert "\n" not in line
    for word in said:
        assert word in line


def test_errors_name_the_full_key() -> None:
    for tree, key in (
        ({"loader": {"threads": 0}}, "loader.threads"),
        ({"data": {"stage": {"dir": "d", "threads": 0}}}, "data.stage.threads"),
        ({"data": {"stage": {}}}, "data.stage.dir"),
        ({"data": {"simulate": {"steps": 1}}}, "data.simulate.steps"),
        ({"schedule": {"initial_lr": -1}}, "schedule.initial_lr"),
        ({"log": {"every": 0}}, "log.every"),
        ({"optimizer": {"kind": "adam", "betas": [1]}}, "optimizer.betas"),
        ({"model": {"kind": "open", "widths": []}}, "model.widths"),
    ):
        with pytest.raises(ConfigError) as refusal:
            resolve(tree)
        assert refusal.value.key == key


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("schedule: {initial_lr: 1e-4}\n")
    assert flatten(resolve(read_yaml(tmp_path / "a.yaml"))[0])["schedule.initial_lr"] == 1e-4


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\x00", "!!python/object:os.system {}\n"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        resolve(read_yaml(path))
