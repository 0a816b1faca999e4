"""Errors survive pickling, as they are sent between ranks and processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipelines.distributed.session import RankError
from pipelines.distributed.world import World
from pipelines.errors import AccessError, ConfigError, DataError, UserError, writing
from preprocess.conversion.task_result import DamagedSourceError

UNREADABLE = AccessError.reading("/a", OSError(5, "Input/output error"))


@pytest.mark.parametrize(
    "error",
    [
        UserError("no"),
        DataError("/a", "is bad", "fix it"),
        UNREADABLE,
        ConfigError("key", 3, "too many"),
        RankError(World(1, 2), DataError("/a", "is bad", "fix it")),
        DamagedSourceError([DataError("/a", "is bad", "fix it"), UNREADABLE], 2),
        DamagedSourceError([UNREADABLE, UNREADABLE], 2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: UserError) -> None:
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is type(error) and str(sent) == str(error)
    if isinstance(error, DamagedSourceError):
        assert vars(sent) == vars(error)


def test_remedy_for_a_folder_that_cannot_be_made_names_what_is_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere/at/all")
    for folder, named in (("file", "file"), ("link", "nowhere/at/all"), ("link/train", "nowhere/at/all")):
        with pytest.raises(AccessError) as refused, writing(tmp_path / folder):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        assert named in refused.value.remedy and "remove the " in refused.value.remedy


def test_files_of_a_source_are_unreadable_only_if_no_sample_was_read() -> None:
    damaged = DataError("/b", "is bad", "fix it")
    assert DamagedSourceError([UNREADABLE, UNREADABLE], 2).unreadable == {"/a": UNREADABLE.fault}
    assert DamagedSourceError([UNREADABLE, UNREADABLE], 3).unreadable == {}
    assert DamagedSourceError([UNREADABLE, damaged], 2).unreadable == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("gpu", "gpu"),
        ("3", "'3'"),
        ((4, 8), "[4, 8]"),
        ({"kind": "sgd", "momentum": None}, "{kind: sgd, momentum: null}"),
        (Path("/data/set"), "/data/set"),
        ("two\nlines", "'two lines'"),
    ],
)
def test_values_are_shown_as_in_a_yaml_file(value: object, text: str) -> None:
    assert str(ConfigError("a.key", value, "is wrong")) == f"a.key = {text}: is wrong"
