"""The state of the files that are staged, as their storage tells it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from threading import Event

from helpers import write_tiny

from pipelines.dataset.open import open_folder
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.storage.base import FileState, Layer
from pipelines.storage.local import LOCAL
from pipelines.storage.location import Location
from preprocess.staging.inventory import compute_fingerprints


@dataclass(frozen=True)
class Remote(Layer):
    """Local files; the answer about the first one waits for another question."""

    calls: Iterator[int] = field(default_factory=count)
    asked: Event = field(default_factory=Event)

    @property
    def is_remote(self) -> bool:
        return True

    def state(self, path: Location) -> FileState:
        if next(self.calls):
            self.asked.set()
        else:
            assert self.asked.wait(timeout=10)
        return self.inner.state(path)


def test_states_of_remote_files_are_asked_for_many_at_a_time(tmp_path: Path) -> None:
    split = open_folder(write_tiny(tmp_path, train=6, validation=1) / "train")
    session = Session(World())
    found = compute_fingerprints(replace(split, storage=Remote(LOCAL)), session)
    assert found.tolist() == compute_fingerprints(split, session).tolist()
