"""Configuration from YAML files and flags: accepted and refused settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cosmoflow_dali.arguments import FLAGS, parse
from cosmoflow_dali.config import CONFIGS, TrainConfig, flatten, read_yaml, resolve
from pipelines.errors import ConfigError, DataError, UserError
from pipelines.settings import settings

REFERENCE = ["--config", str(CONFIGS / "reference.yaml")]


def test_defaults_are_those_of_the_original_readme() -> None:
    config = flatten(resolve({}))
    assert config["seed"] is None
    assert (config["schedule.initial_lr"], config["schedule.base_lr"]) == (0.001, 0.008)
    assert (config["optimizer.weight_decay"], config["model.dropout"]) == (0.0, 0.5)
    assert config["schedule.warmup_epochs"] == 4
    assert config["schedule.decay_epochs"] == (32, 64)
    assert config["schedule.decay_factors"] == (0.25, 0.125)
    assert config["shuffle"] is False


def test_every_config_resolves_and_survives_being_saved() -> None:
    for path in CONFIGS.glob("*.yaml"):
        config = resolve(read_yaml(path))
        assert resolve(dataclasses.asdict(config)) == config


def test_symmetries_of_an_older_run_keep_their_meaning() -> None:
    for value in (False, True, "periodic"):
        assert resolve({"symmetries": value}).symmetries is value
    refused: tuple[object, ...] = (1, "true", "cube")
    for other in refused:
        with pytest.raises(ConfigError) as error:
            resolve({"symmetries": other})
        assert (error.value.key, error.value.value) == ("symmetries", other)


def test_crops_of_a_box_are_not_periodic() -> None:
    tree = {"symmetries": "periodic", "model": {"size": 32}, "data": {"simulate": {"crops": 2}}}
    with pytest.raises(ConfigError) as error:
        resolve(tree)
    assert error.value.key == "symmetries"
    assert resolve({**tree, "symmetries": True}).symmetries is True


def test_every_setting_has_a_description_and_every_flag_a_setting() -> None:
    known = {setting.key: setting for setting in settings(TrainConfig)}
    assert [key for key, setting in known.items() if not setting.meaning] == []
    assert set(FLAGS.values()) <= known.keys()


def test_flags_override_the_file() -> None:
    flags = "--base-lr 0.002 --lr-scheduler-epochs 5 6 7 --lr-scheduler-decays 0.5 0.25 0.1"
    arguments = parse([*REFERENCE, *flags.split(), "--batch-size", "2", "--no-shuffle"])
    config = flatten(arguments.config)
    assert config["schedule.base_lr"] == 0.002
    assert config["schedule.decay_epochs"] == (5, 6, 7)
    assert config["schedule.initial_lr"] == 0.001
    assert config["loader.batch_size"] == 2
    assert config["shuffle"] is False


def test_weight_decay_without_dropout_turns_dropout_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "cosmoflow_dali"):
        parse(REFERENCE)
        assert caplog.text == ""
        arguments = parse([*REFERENCE, "--weight-decay", "0.02"])
    assert flatten(arguments.config)["model.dropout"] == 0.0
    assert "model.dropout" in caplog.text


def error_of(build: Any, *arguments: Any) -> UserError:
    """Return the UserError that the call raises; it is one line."""
    with pytest.raises(UserError) as refusal:
        build(*arguments)
    assert "\n" not in str(refusal.value)
    return refusal.value


def test_invalid_flags_are_refused_by_key() -> None:
    cases: list[tuple[str, str, object]] = [
        ("--weight-decay 0.02 --dropout 0.1", "optimizer.weight_decay", 0.02),
        ("--seed -1", "seed", -1),
        ("--base-lr 0.0001", "schedule.base_lr", 0.0001),
        ("--dropout 1", "model.dropout", 1.0),
        ("--weight-decay -1", "optimizer.weight_decay", -1.0),
        ("--warmup-epochs -1", "schedule.warmup_epochs", -1),
        ("--lr-scheduler-decays 0.5", "schedule.decay_factors", (0.5,)),
        ("--lr-scheduler-decays 0.5 1.5", "schedule.decay_factors", (0.5, 1.5)),
        ("--epochs 0", "epochs", 0),
        ("--batch-size 0", "loader.batch_size", 0),
        ("--target-mae 0", "target_mae", 0.0),
        ("--resume", "--resume", True),
        ("--instances 2", "--instances", 2),
        ("--staged-since 5", "--staged-since", 5),
        ("--set loader.threads", "--set", "loader.threads"),
        ("--set loader={", "--set", "loader={"),
        ("--set loader.thread=2", "loader.thread", 2),
        ("--set shuffle.threads=2", "shuffle.threads", 2),
        ('--set loader={"threads":1,"threads":2}', "--set", 'loader={"threads":1,"threads":2}'),
        ("--set epochs=1:30", "epochs", "1:30"),
        ("--set schedule.base_lr=010", "schedule.base_lr", "010"),
        ("--set seed=0x_", "--set", "seed=0x_"),
    ]
    for flags, key, value in cases:
        error = error_of(parse, [*REFERENCE, *flags.split()])
        assert isinstance(error, ConfigError) and (error.key, error.value) == (key, value), flags
    assert isinstance(error_of(parse, [*REFERENCE, "--base-lr", "nan"]), ConfigError)
    for flags in ("--base-lr fast", "--what"):
        assert flags.split()[0] in str(error_of(parse, [*REFERENCE, *flags.split()]))
    missing = error_of(parse, ["--config", "missing.yaml"])
    assert isinstance(missing, DataError) and missing.path == "missing.yaml"
    assert "reference" in missing.remedy


def test_invalid_settings_are_refused_by_their_full_key() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"epoch": 3}, "epoch"),
        ({"modell": {}}, "modell"),
        ({"loader": {"batch": 3}}, "loader.batch"),
        ({"loader": 3}, "loader"),
        ({"epochs": "many"}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"shuffle": 1}, "shuffle"),
        ({"model": {"kind": "closed"}}, "model.kind"),
        ({"device": "tpu"}, "device"),
        ({"schedule": {"decay_epochs": 3}}, "schedule.decay_epochs"),
        ({"schedule": {"kind": "one_cycle", "base_lr": 0.1}}, "schedule.base_lr"),
        ({"data": {"dir": "d", "simulate": {"size": 32}}}, "model.size"),
        ({"loader": {"threads": 0}}, "loader.threads"),
        ({"data": {"stage": {"dir": "d", "threads": 0}}}, "data.stage.threads"),
        ({"data": {"stage": {}}}, "data.stage.dir"),
        ({"data": {"simulate": {"steps": 1}}}, "data.simulate.steps"),
        ({"schedule": {"initial_lr": -1}}, "schedule.initial_lr"),
        ({"schedule": {"initial_lr": True}}, "schedule.initial_lr"),
        ({"log": {"every": 0}}, "log.every"),
        ({"optimizer": {"kind": "adam", "betas": [1]}}, "optimizer.betas"),
        ({"model": {"kind": "open", "widths": []}}, "model.widths"),
    ]
    for tree, key in cases:
        error = error_of(resolve, tree)
        assert isinstance(error, ConfigError) and error.key == key, tree
    assert "did you mean epochs" in str(error_of(resolve, {"epoch": 3}))
    assert "batch_size" in str(error_of(resolve, {"loader": {"batch": 3}}))


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("schedule: {initial_lr: 1e-4}\n")
    assert flatten(resolve(read_yaml(tmp_path / "a.yaml")))["schedule.initial_lr"] == 1e-4


def test_files_without_a_mapping_are_refused_by_path(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text in ("- a\n- b\n", "a: [1\n", "\x00", "!!python/object:os.system {}\n"):
        path.write_text(text)
        error = error_of(read_yaml, path)
        assert isinstance(error, DataError) and error.path == str(path)
