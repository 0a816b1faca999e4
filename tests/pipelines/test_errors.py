"""Errors survive pickling, as they are sent between ranks and processes."""

from __future__ import annotations

import pickle

import pytest

from pipelines.distributed.session import RankError
from pipelines.distributed.world import World
from pipelines.errors import AccessError, ConfigError, DataError, UserError
from preprocess.conversion.task_result import DamagedSourceError


@pytest.mark.parametrize(
    "error",
    [
        UserError("no"),
        DataError("/a", "is bad", "fix it"),
        AccessError.reading("/a", OSError(5, "Input/output error")),
        ConfigError("key", 3, "too many"),
        RankError(World(1, 2), DataError("/a", "is bad", "fix it")),
        DamagedSourceError(["/a: is bad", "/b: cannot be read"], {}),
        DamagedSourceError(["/a: cannot be read"], {"/a": "cannot be read"}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: UserError) -> None:
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is type(error) and str(sent) == str(error)
    if isinstance(error, DamagedSourceError):
        assert vars(sent) == vars(error)
