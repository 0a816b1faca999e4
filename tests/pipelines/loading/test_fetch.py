"""Samples of slow storage are fetched ahead: the same batches, requests in flight, neighbours together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_sample

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.errors import DataError, StorageError
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.payload import Payload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.sample import Batch
from pipelines.storage.base import Layer
from pipelines.storage.local import LOCAL, clear_open_files
from pipelines.storage.location import Location
from pipelines.storage.requests import COUNTS

SHARDS, IN_SHARD = 3, 8
LATENCY = 0.01


@dataclass(eq=False)
class Calls:
    """The requests that storage has got, and most at a time."""

    extents: list[list[tuple[int, int]]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class SlowStorage(Layer):
    """Local files that take long to answer, and may refuse what is in `fails`."""

    calls: Calls = field(default_factory=Calls)
    fails: type[Exception] | None = None

    @property
    def is_remote(self) -> bool:
        return True

    def read_ranges(self, path: Location, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        calls = self.calls
        with calls.lock:
            calls.extents.append(list(extents))
            calls.running += 1
            calls.most = max(calls.most, calls.running)
        time.sleep(LATENCY)
        with calls.lock:
            calls.running -= 1
        if self.fails is not None:
            raise self.fails(path, "is refused", "wait")
        return [self.inner.read_range(path, *extent) for extent in extents]

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        return self.read_ranges(path, [(offset, length)])[0]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> SampleDataset:
    folder = tmp_path_factory.mktemp("packed")
    for shard in range(SHARDS):
        numbers = range(shard * IN_SHARD, (shard + 1) * IN_SHARD)
        write_shard(folder / f"{shard}.tar", [(f"{n:03d}.packed", encode(tiny_sample(n))) for n in numbers])
    return open_folder(folder)


def make_loader(split: SampleDataset, *, shuffle: bool, batch_size: int = 1, **config: Any) -> Loader:
    return Loader(
        split,
        LoaderConfig(batch_size=batch_size, **config),
        rank_slice=RankSlice(),
        seed=3,
        shuffle=shuffle,
        ragged="drop",
        device=torch.device("cpu"),
    )


@contextmanager
def open_loader(split: SampleDataset, **settings: Any) -> Iterator[Loader]:
    loader = make_loader(split, **settings)
    try:
        yield loader
    finally:
        loader.close()


def copied(batches: Iterator[Batch]) -> list[tuple[list[int], bytes, bytes]]:
    return [
        (batch.index.tolist(), batch.volume.numpy().tobytes(), batch.target.numpy().tobytes())
        for batch in batches
    ]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("ahead", [None, 1, 40])
def test_batches_are_those_of_local_files(local: SampleDataset, shuffle: bool, ahead: int | None) -> None:
    slow = replace(local, storage=SlowStorage(LOCAL))
    with open_loader(local, shuffle=shuffle, batch_size=2) as loader:
        expected = [copied(loader.batches(epoch)) for epoch in range(2)]
    with open_loader(slow, shuffle=shuffle, batch_size=2, requests_ahead=ahead) as loader:
        assert [copied(loader.batches(epoch)) for epoch in range(2)] == expected
        # A resume discards what was fetched for later.
        assert copied(loader.batches(1, 5)) == expected[1][5:]
        assert copied(loader.batches(0, 3)) == expected[0][3:]


def test_latency_is_hidden(local: SampleDataset) -> None:
    storage = SlowStorage(LOCAL)
    with open_loader(replace(local, storage=storage), shuffle=True) as loader:
        copied(loader.batches(0))
    assert storage.calls.most >= 8
    storage = SlowStorage(LOCAL)
    with open_loader(replace(local, storage=storage), shuffle=True, requests_ahead=2) as loader:
        copied(loader.batches(0))
    assert storage.calls.most <= 2


def test_neighbours_are_read_by_one_request(local: SampleDataset) -> None:
    storage = SlowStorage(LOCAL)
    with open_loader(replace(local, storage=storage), shuffle=False, requests_ahead=16) as loader:
        copied(loader.batches(0))
    samples = [extent for extents in storage.calls.extents for extent in extents]
    assert len(storage.calls.extents) < len(samples) / 3
    for extents in storage.calls.extents:
        assert extents == sorted(extents) and len(extents) <= IN_SHARD


def test_a_damaged_sample_among_neighbours_is_read_again_and_named(
    local: SampleDataset, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in Path(local.root).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    split = open_folder(folder)
    damaged = 5
    offset, length, _ = split.member_extents[damaged].item()
    shard = Path(split.files(damaged)[0])
    content = bytearray(shard.read_bytes())
    content[offset + length - 1] ^= 1
    shard.write_bytes(content)
    split = open_folder(folder)
    with open_loader(replace(split, storage=SlowStorage(LOCAL)), shuffle=False) as loader:
        with pytest.raises(DataError) as raised:
            copied(loader.batches(0))
        assert raised.value.path == str(split.path(damaged))
    with open_loader(
        replace(split, storage=SlowStorage(LOCAL)), shuffle=False, on_bad_sample="skip"
    ) as loader:
        index = np.concatenate([batch.index for batch in loader.batches(0)])
    assert index.tolist() == [6 if number == damaged else number for number in range(SHARDS * IN_SHARD)]
    assert loader.skipped.keys() == {str(split.path(damaged))}


def test_a_server_that_fails_ends_the_batches_even_if_samples_are_skipped(local: SampleDataset) -> None:
    for skip in ("fail", "skip"):
        split = replace(local, storage=SlowStorage(LOCAL, fails=StorageError))
        with (
            open_loader(split, shuffle=False, on_bad_sample=skip) as loader,
            pytest.raises(StorageError),
        ):
            next(loader.batches(0))
        assert not loader.skipped


def test_a_server_that_asks_for_fewer_requests_gets_fewer(
    local: SampleDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_loader(replace(local, storage=SlowStorage(LOCAL)), shuffle=True) as loader:
        batches = loader.batches(0)
        next(batches)
        assert loader._fetcher is not None
        before = loader._fetcher._ahead
        monkeypatch.setattr(COUNTS, "throttled", COUNTS.throttled + 1)
        next(batches)
        assert loader._fetcher._ahead == max(2, before // 2)


def test_a_loader_closes_while_samples_wait_to_be_fetched(
    local: SampleDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SampleDataset.payload

    def slow(dataset: SampleDataset, index: int, **options: Any) -> Payload:
        time.sleep(0.02)
        return read(dataset, index, **options)

    monkeypatch.setattr(SampleDataset, "payload", slow)
    loader = make_loader(local, shuffle=False, batch_size=8, requests_ahead=1)
    next(loader.batches(0))
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(timeout=10)
    assert not closing.is_alive()


def test_samples_of_a_missing_shard_are_skipped(tmp_path: Path) -> None:
    for shard in range(3):
        members = [(f"{shard}{index}.packed", encode(tiny_sample(index, size=2))) for index in range(4)]
        write_shard(tmp_path / f"{shard}.tar", members)
    split = open_folder(tmp_path)
    # Opening the folder has read sample 0, and its shard is still open.
    clear_open_files()
    Path(split.files(4)[0]).unlink()
    read = {}
    for ahead in (0, 12):
        with open_loader(
            split, shuffle=False, batch_size=4, requests_ahead=ahead, on_bad_sample="skip"
        ) as loader:
            read[ahead] = [batch.index.tolist() for batch in loader.batches(0)]
            assert len(loader.skipped) == 4
    assert read[12] == read[0] == [[0, 1, 2, 3], [8, 8, 8, 8], [8, 9, 10, 11]]
