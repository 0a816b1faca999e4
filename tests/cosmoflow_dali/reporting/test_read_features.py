"""Reading of summaries and network outputs: how many samples at once, by how many threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_tiny

from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.reporting import read_features as module
from cosmoflow_dali.reporting.read_features import Network, read_features
from pipelines.dataset.open import open_folder
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.loading.reader import Reader
from pipelines.sample import Sample
from pipelines.storage.local import LocalStorage


class Recorder(Network):
    """A network that records how many samples it gets at a time."""

    batches: list[int] = []  # noqa: RUF012 (a class of one test)

    def outputs(self, counts: Any) -> Any:
        self.batches.append(len(counts))
        return super().outputs(counts)


@pytest.mark.parametrize(("size", "largest"), [(16, 16), (64, 2), (128, 1)])
def test_large_samples_are_read_in_smaller_batches(
    size: int, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A network of any size: the samples are small, but the limit is scaled to match.
    monkeypatch.setattr(module, "_BATCH_VOXELS", module._BATCH_VOXELS * 16**3 // size**3)
    split = open_folder(write_tiny(tmp_path / "data", train=20, validation=1, size=16) / "train")
    network = Recorder(build_model(OpenConfig(size=16, widths=(2, 2)), 0).eval(), apply_log=True)
    network.batches.clear()
    features = read_features(Reader(split), network, Session(World()))
    assert features is not None and features.outputs is not None
    assert len(features) == sum(network.batches) == 20
    assert max(network.batches) == largest
    np.testing.assert_array_equal(features.targets, [split.read(index).target for index in range(20)])


def test_ranks_of_a_node_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, number: int) -> None:
            threads.append(number)
            super().__init__(number)

    monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr("pipelines.distributed.world.available_cores", lambda: 64)
    split = open_folder(write_tiny(tmp_path / "data", train=4, validation=1) / "train")
    for others, expected in ((0, 64), (7, 8)):
        read_features(Reader(split), None, Session(World(other_local_ranks=others)))
        assert threads.pop() == expected


class Distant(LocalStorage):
    """Local files that count as remote."""

    @property
    def is_remote(self) -> bool:
        return True


def test_remote_samples_are_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_folder(write_tiny(tmp_path / "data", train=16, validation=1) / "train")
    local = read_features(Reader(split), None, Session(World()))
    read, together = Reader.sample, threading.Barrier(16, timeout=10)

    def sample(reader: Reader, index: int) -> Sample | None:
        together.wait()
        return read(reader, index)

    monkeypatch.setattr(Reader, "sample", sample)
    remote = read_features(Reader(replace(split, storage=Distant())), None, Session(World()))
    assert local is not None and remote is not None and remote.ids == local.ids
    np.testing.assert_array_equal(remote.summaries, local.summaries)
