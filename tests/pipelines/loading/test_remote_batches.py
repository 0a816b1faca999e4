"""Batches of samples in an object store are those of the same files on a disk, whatever requests meet."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fault_proxy import FaultProxy, Rule
from helpers import inline_workers, program, write_tiny
from object_store import Bucket

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.errors import StorageError
from pipelines.formats.payload import CountsPayload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.loading.reader import Reader
from pipelines.plan import RankSlice
from pipelines.slab import Slab
from pipelines.storage import requests
from pipelines.storage.location import parse_location
from pipelines.storage.requests import COUNTS

SAMPLES = 12
SLABS = [None, Slab(0, 2, periodic=True), Slab(1, 2, periodic=False)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples in every format that is read remotely, each folder with a manifest.

    In "single" each packed sample has a shard of its own.
    """
    root = tmp_path_factory.mktemp("sets")
    with inline_workers():
        for name in ("npy", "tfrecord_gzip"):
            write_tiny(root / name, train=SAMPLES, validation=1, format_name=name, size=8)
            assert program("preprocess.verify", root / name, "--write").code == 0
        for name, count in (("packed", 5), ("single", 1)):
            line = ["-i", root / "npy", "-o", root / name, "--to", "packed", "--samples-per-shard", count]
            assert program("preprocess.convert", *line).code == 0
    return root


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of a network of this machine."""
    for name, seconds in (("_RACE_SECONDS", 0.1), ("_FIRST_PAUSE", 0.01), ("_THROTTLED_PAUSE", 0.02)):
        monkeypatch.setattr(requests, name, seconds)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index of each sample that was read since."""
    found: list[int] = []
    payload = Reader.payload

    def counted(self: Reader, index: int, *arguments: Any, **options: Any) -> Any:
        found.append(index)
        return payload(self, index, *arguments, **options)

    monkeypatch.setattr(Reader, "payload", counted)
    return found


def remote(bucket: Bucket, sets: Path, name: str) -> SampleDataset:
    bucket.put(sets / name / "train", name)
    return open_folder(parse_location(f"{bucket.url}/{name}", ""))


@contextmanager
def open_loader(
    split: SampleDataset, *, shuffle: bool = True, slab: Slab | None = None, **config: Any
) -> Iterator[Loader]:
    loader = Loader(
        split,
        LoaderConfig(batch_size=2, **config),
        rank_slice=RankSlice(),
        seed=9,
        shuffle=shuffle,
        ragged="drop",
        device=torch.device("cpu"),
        slab=slab,
        agree=lambda array: array,
    )
    try:
        yield loader
    finally:
        loader.close()


def steps(loader: Loader, epochs: int = 2, first: int = 0) -> list[list[npt.NDArray[Any]]]:
    """Index, volume and target of each step from the step `first` of the first epoch on."""
    return [
        [batch.index.copy(), batch.volume.numpy().copy(), batch.target.numpy().copy()]
        for epoch in range(epochs)
        for batch in loader.batches(epoch, 0 if epoch else first)
    ]


def load(split: SampleDataset, epochs: int = 2, **arguments: Any) -> list[list[npt.NDArray[Any]]]:
    with open_loader(split, **arguments) as loader:
        found = steps(loader, epochs)
        assert not loader.skipped
    return found


def equal(one: list[list[npt.NDArray[Any]]], other: list[list[npt.NDArray[Any]]]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a, b) for step in zip(one, other, strict=True) for a, b in zip(*step, strict=True)
    )


def faults(fraction: float, corrupt: int) -> list[Rule]:
    """Every fault of a transfer, for that part of the requests for samples; `corrupt` of them corrupted."""
    match = r"^GET .*(tar|npy|tfrecord)"
    return [
        Rule("corrupt", match, skip=3, times=corrupt),
        Rule("reset", match, fraction),
        Rule("reset", match, fraction, after=100),
        Rule("truncate", match, fraction),
        Rule("slow down", match, fraction),
        Rule("stall", match, fraction, times=1),
        Rule("stall", match, fraction, times=1, after=50),
    ]


@pytest.mark.parametrize("policy", ["fail", pytest.param("skip", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "slab"),
    [
        ("npy", None),
        ("packed", None),
        ("packed", SLABS[1]),
        ("tfrecord_gzip", None),
        pytest.param("packed", SLABS[2], marks=pytest.mark.slow),
        pytest.param("npy", SLABS[1], marks=pytest.mark.slow),
        pytest.param("npy", SLABS[2], marks=pytest.mark.slow),
    ],
    ids=lambda value: f"slab {value.index}" if isinstance(value, Slab) else value,
)
def test_batches_are_the_same_bits_whatever_requests_meet(
    name: str, slab: Slab | None, policy: str, bucket: Bucket, fault_proxy: FaultProxy, sets: Path
) -> None:
    split, local = remote(bucket, sets, name), open_folder(sets / name / "train")
    # With "skip", no sample is skipped because of its transfer, and none is damaged.
    shuffle = policy == "fail"
    fault_proxy.configure(*faults(0.03, 2))
    before = COUNTS.retries + COUNTS.raced
    found = load(split, shuffle=shuffle, slab=slab, on_bad_sample=policy)
    assert equal(found, load(local, shuffle=shuffle, slab=slab))
    met = [one for one in fault_proxy.requests() if one.fault]
    # A request that stalls is raced, and a race may be lost. One in flight at the end is not waited for.
    assert len(met) >= 2 and 0 < COUNTS.retries + COUNTS.raced - before <= 2 * len(met)


def test_corruption_is_found_in_each_file_of_a_sample_also_for_a_slab(
    bucket: Bucket, fault_proxy: FaultProxy, sets: Path
) -> None:
    split, local = remote(bucket, sets, "npy"), open_folder(sets / "npy" / "train")
    for slab in SLABS[:2]:
        for suffix, at in (("_data.npy", 200), ("_label.npy", 130)):
            fault_proxy.configure(Rule("corrupt", suffix, after=at, times=2))
            for index in (0, 1):
                found, expected = (each.payload(index, slab=slab) for each in (split, local))
                assert isinstance(found, CountsPayload) and isinstance(expected, CountsPayload)
                assert np.array_equal(found.counts, expected.counts)
                assert np.array_equal(found.target, expected.target)
            assert sum(one.fault == "corrupt" for one in fault_proxy.requests()) == 2
            fault_proxy.reset()


@pytest.mark.parametrize(("slab", "most"), [(None, 1.05), (SLABS[1], 3)])
def test_a_sample_takes_few_requests_and_no_byte_too_many(
    slab: Slab | None,
    most: float,
    bucket: Bucket,
    fault_proxy: FaultProxy,
    sets: Path,
    read: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # None is raced on a machine that is busy.
    monkeypatch.setattr(requests, "_RACE_SECONDS", 10.0)
    split = remote(bucket, sets, "single")
    assert len(fault_proxy.requests()) == 1  # The manifest.
    load(split, 3, slab=slab)
    done = fault_proxy.requests()[1:]
    assert len(read) >= 3 * SAMPLES
    assert len(done) <= most * len(read) + (2 if slab else 0)
    if slab is None:
        assert sum(one.sent for one in done) <= 1.01 * split.member_extents["bytes"][read].sum()


def test_neighbours_are_joined_in_file_order(
    bucket: Bucket, fault_proxy: FaultProxy, sets: Path, read: list[int]
) -> None:
    split = remote(bucket, sets, "packed")
    found = load(split, shuffle=False)
    assert len(fault_proxy.requests()) < len(read) / 2
    assert equal(found, load(open_folder(sets / "packed" / "train"), shuffle=False))


@pytest.mark.parametrize("policy", ["fail", pytest.param("skip", marks=pytest.mark.slow)])
def test_a_server_that_stops_ends_the_epoch_and_a_resume_continues_it(
    policy: str, bucket: Bucket, fault_proxy: FaultProxy, sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "DEADLINE_SECONDS", 0.5)
    split, whole = remote(bucket, sets, "packed"), load(open_folder(sets / "packed" / "train"))
    found = []
    with open_loader(split, on_bad_sample=policy, requests_ahead=2) as loader:
        batches = loader.batches(0)
        found += [[batch.index.copy()] for batch in itertools.islice(batches, 2)]
        fault_proxy.refuse()
        started = time.monotonic()
        with pytest.raises(StorageError) as error:
            found += [[batch.index.copy()] for batch in batches]
        assert time.monotonic() - started < 4
        assert error.value.path.startswith(f"{bucket.url}/packed/shard_") and not loader.skipped
    fault_proxy.accept()
    assert equal(found, [step[:1] for step in whole[: len(found)]])
    with open_loader(split, on_bad_sample=policy) as loader:
        assert equal(steps(loader, first=len(found)), whole[len(found) :])


def test_a_web_server_gives_the_same_batches(bucket: Bucket, sets: Path) -> None:
    for name in ("packed", "npy"):
        bucket.put(sets / name / "train", name)
        split = open_folder(parse_location(f"{bucket.http}/{name}", ""))
        assert equal(load(split, 1), load(open_folder(sets / name / "train"), 1))
