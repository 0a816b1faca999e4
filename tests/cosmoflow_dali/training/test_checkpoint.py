"""Checkpoints are read back intact or refused."""

from __future__ import annotations

import errno
import os
import random
import resource
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from cosmoflow_dali.config import resolve
from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.training.checkpoint import KEEP, Checkpoint, Position
from cosmoflow_dali.training.pretrained import load_model
from pipelines.errors import AccessError, DataError


def checkpoint(epoch: int = 0, samples: int = 8) -> Checkpoint:
    return Checkpoint(
        config={"epochs": 3},
        seed=7,
        global_batch=4,
        train_samples=26,
        position=Position(epoch, samples),
        model={"w": torch.arange(1000.0)},
        optimizer={
            "state": {0: {"momentum_buffer": torch.ones(1000)}},
            "param_groups": [{"lr": 0.1}],
        },
        scores={"mae": 0.5, "residual_rms": {"Omega_m": 0.6}},
        seconds={"train": 1.5},
        skipped={"train": ["a.npy"], "validation": []},
        logs={"metrics.jsonl": 12},
        mlperf_log=':::MLLOG {"key": "run_start"}\n',
    )


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    saved = checkpoint()
    loaded = Checkpoint.load(saved.save(tmp_path))
    for name in saved.__slots__:
        if name not in ("model", "optimizer"):
            assert getattr(loaded, name) == getattr(saved, name)
    assert torch.equal(loaded.model["w"], saved.model["w"])
    assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], torch.ones(1000))


def test_newest_checkpoints_by_position_are_kept(tmp_path: Path) -> None:
    for epoch in range(3):
        for samples in (0, 4, 100):
            checkpoint(epoch, samples).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == KEEP
    newest = Checkpoint.newest(tmp_path)
    assert newest is not None and newest.position == Position(2, 100)


def test_copies_under_other_names_are_neither_removed_nor_resumed(tmp_path: Path) -> None:
    copy = checkpoint(0).save(tmp_path).rename(tmp_path / "epoch00000_sample000000008_best.pt")
    late = checkpoint(9).save(tmp_path).rename(tmp_path / "epoch00009_sample000000008.old.pt")
    for epoch in range(1, KEEP + 2):
        checkpoint(epoch).save(tmp_path)
    assert copy.exists() and late.exists() and len(list(tmp_path.iterdir())) == KEEP + 2
    newest = Checkpoint.newest(tmp_path)
    assert newest is not None and newest.position.epoch == KEEP + 1


def test_temporary_file_of_a_killed_writer_is_removed_and_never_read(tmp_path: Path) -> None:
    (tmp_path / ".epoch00009_sample000000000.pt.77.tmp").write_bytes(b"half")
    assert Checkpoint.newest(tmp_path) is None
    saved = checkpoint().save(tmp_path)
    assert list(tmp_path.iterdir()) == [saved]


def test_newest_without_checkpoints_is_none(tmp_path: Path) -> None:
    assert Checkpoint.newest(tmp_path) is None
    assert Checkpoint.newest(tmp_path / "missing") is None


class HyperParameters:
    """An object as other programs store it beside the weights."""


def test_files_of_other_programs_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = checkpoint().save(tmp_path)
    state = torch.load(path, weights_only=True)
    for foreign, reason in (
        ({"state_dict": state["model"], "hyper_parameters": HyperParameters()}, "HyperParameters"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (state["model"], "it has no version"),
        ({"version": 1, "state_dict": state["model"]}, "it has no config"),
        ({name: value for name, value in state.items() if name != "position"}, "it has no position"),
        (state | {"config": None}, "its config is not a mapping"),
    ):
        torch.save(foreign, path)
        with pytest.raises(DataError) as refused:
            Checkpoint.load(path)
        assert refused.value.path == str(path) and reason in str(refused.value)
        assert "trust" not in str(refused.value) and "older" not in str(refused.value)
    # What someone adds to a checkpoint does no harm.
    torch.save(state | {"comment": "the best one"}, path)
    assert Checkpoint.load(path).position == Position(0, 8)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    config = resolve({"model": {"kind": "reference", "size": 8, "blocks": 1, "filters": 2}})
    weights = build_model(config.model, 0).state_dict()
    assert load_model(replace(checkpoint(), config=asdict(config), model=weights).save(tmp_path)).size == 8
    for changed in (
        {f"_orig_mod.{name}": value for name, value in weights.items()},
        dict(list(weights.items())[1:]),
        {name: value[:1] for name, value in weights.items()},
    ):
        path = replace(checkpoint(), config=asdict(config), model=changed).save(tmp_path)
        with pytest.raises(DataError) as refused:
            load_model(path)
        assert refused.value.path == str(path) and "\n" not in str(refused.value)


def test_flipped_bits_and_truncation_are_detected(tmp_path: Path) -> None:
    path = checkpoint().save(tmp_path)
    whole, rng = path.read_bytes(), random.Random(3)
    refused = 0
    for _ in range(150):
        broken = bytearray(whole)
        if rng.random() < 0.3:
            del broken[rng.randrange(len(broken)) :]
        else:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        try:
            loaded = Checkpoint.load(path)
        except DataError as error:
            assert error.path == str(path)
            refused += 1
        else:  # some bytes of the zip container, such as dates, have no effect
            assert torch.equal(loaded.model["w"], torch.arange(1000.0))
            assert loaded.position == Position(0, 8)
    assert refused > 100


def test_damaged_newest_checkpoint_falls_back_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(1, 0).save(tmp_path)
    newest = checkpoint(2, 0).save(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level("WARNING", "cosmoflow_dali"):
        found = Checkpoint.newest(tmp_path)
    assert newest.name in caplog.text
    assert found is not None and found.position == Position(1, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failed_save_is_an_error_of_the_path_and_leaves_the_older_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = checkpoint(1).save(tmp_path)

    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    # Some file systems report a full disk only here.
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(AccessError) as failure:
        checkpoint(2).save(tmp_path)
    assert os.strerror(number) in failure.value.fault and "epoch00002" in failure.value.path
    assert list(tmp_path.iterdir()) == [older]


def test_write_that_fails_in_the_middle_of_a_save_is_an_error_of_the_path(tmp_path: Path) -> None:
    older = checkpoint(1).save(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel accepts a part of the content, then refuses with EFBIG, as a full disk does with ENOSPC.
    resource.setrlimit(resource.RLIMIT_FSIZE, (older.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(AccessError) as failure:
            checkpoint(2).save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in failure.value.fault
    assert list(tmp_path.iterdir()) == [older]


def test_version_1_has_no_copy_of_the_mlperf_log(tmp_path: Path) -> None:
    path = checkpoint().save(tmp_path)
    state = torch.load(path, weights_only=True)
    del state["mlperf_log"]
    torch.save(state | {"version": 1}, path)
    assert Checkpoint.load(path).mlperf_log == ""
    torch.save(state | {"version": 3}, path)
    with pytest.raises(DataError):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    ("position", "begun", "text"),
    [
        (Position(3), 3, "3 epochs"),
        (Position(1), 1, "1 epoch"),
        (Position(2, 8), 3, "2 epochs and 8 samples of the next"),
    ],
)
def test_position_counts_the_epochs_that_are_begun(position: Position, begun: int, text: str) -> None:
    assert (position.begun_epochs, str(position)) == (begun, text)


def test_other_files_are_refused_by_path(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04", None):
        if content is None:
            torch.save({"state_dict": {}}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(DataError) as refusal:
            Checkpoint.load(path)
        assert refusal.value.path == str(path)
    with pytest.raises(DataError) as refusal:
        Checkpoint.load(tmp_path / "missing.pt")
    assert refusal.value.path == str(tmp_path / "missing.pt")


def test_pickled_code_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    path = tmp_path / "evil.pt"
    torch.save({"version": 1, "position": Evil()}, path)
    with pytest.raises(DataError):
        Checkpoint.load(path)
    assert not (tmp_path / "ran").exists()
