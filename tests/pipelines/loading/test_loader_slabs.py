"""The loader of a rank that shares samples with others: it delivers slabs of them."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import slab_of, slabs, tiny_sample, write_tiny

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.errors import ConfigError, DataError
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.registry import FORMATS
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Agree, Loader
from pipelines.plan import Ragged, RankSlice
from pipelines.slab import Slab

SAMPLES, SIZE = 7, 8

IN_PART = ["npy", "packed"]
"""Formats of which parts can be read."""


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SampleDataset]:
    """The same samples in every format."""
    made = {}
    for name in FORMATS:
        folder = tmp_path_factory.mktemp(name)
        root = write_tiny(folder, train=SAMPLES, validation=1, format_name=name, size=SIZE)
        made[name] = open_folder(root / "train")
    return made


Row: TypeAlias = tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]


def load(
    split: SampleDataset,
    slab: Slab | None,
    *,
    agree: Agree | None = None,
    ragged: Ragged = "drop",
    epochs: int = 1,
    skipped: set[str] | None = None,
    **config: Any,
) -> list[Row]:
    """Index, volume (D, H, W, C) and target of each row; adds the samples left out to `skipped`."""
    loader = Loader(
        split,
        LoaderConfig(batch_size=2, **config),
        rank_slice=RankSlice(),
        seed=9,
        shuffle=True,
        ragged=ragged,
        device=torch.device("cpu"),
        slab=slab,
        agree=agree,
    )
    try:
        return [
            (int(index), volume.permute(1, 2, 3, 0).numpy().copy(), target.numpy().copy())
            for epoch in range(epochs)
            for batch in loader.batches(epoch)
            for index, volume, target in zip(batch.index, batch.volume, batch.target, strict=True)
        ]
    finally:
        loader.close()
        if skipped is not None:
            skipped.update(loader.skipped)


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("slab", slabs(1, 2, 4, 8), ids=str)
@pytest.mark.parametrize("format_name", IN_PART)
def test_batches_are_slabs_of_those_of_whole_samples(
    format_name: str, slab: Slab, direct_io: bool, splits: dict[str, SampleDataset]
) -> None:
    split = splits[format_name]
    whole = load(split, None, ragged="pad", epochs=2)
    found = load(split, slab, ragged="pad", epochs=2, direct_io=direct_io)
    assert [index for index, *_ in found] == [index for index, *_ in whole]
    for (index, volume, target), (_, expected, expected_target) in zip(found, whole, strict=True):
        assert np.isfinite(volume).all() and volume.shape == slab.shape(split.spec)
        if index >= 0:
            np.testing.assert_array_equal(volume, slab_of(expected, slab))
            np.testing.assert_array_equal(target, expected_target)


@pytest.mark.parametrize(
    ("format_name", "slab", "options", "key"),
    [
        ("npy", Slab(0, 3, True), {}, "parallel.spatial"),
        ("npy", Slab(0, 16, True), {}, "parallel.spatial"),
        ("tfrecord", Slab(0, 2, True), {}, "parallel.spatial"),
        ("tfrecord_gzip", Slab(0, 2, True), {}, "parallel.spatial"),
        ("npy", Slab(0, 2, True), {"apply_log": False}, "loader.apply_log"),
        ("npy", Slab(0, 2, True), {"gpu_direct": True}, "loader.gpu_direct"),
    ],
)
def test_what_cannot_be_read_in_part_is_refused(
    format_name: str,
    slab: Slab,
    options: dict[str, Any],
    key: str,
    splits: dict[str, SampleDataset],
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(splits[format_name], slab, **options)
    assert raised.value.key == key


def test_the_command_that_makes_samples_readable_in_part_is_named(splits: dict[str, SampleDataset]) -> None:
    with pytest.raises(ConfigError, match=r"python -m preprocess.convert -i SRC -o DST --to packed"):
        load(splits["tfrecord"], Slab(0, 2, True))


def write_damaged(root: Path, format_name: str, faults: dict[int, int]) -> Path:
    """Write `SAMPLES` samples into `root`, of which those in `faults` are damaged in one plane."""
    root.mkdir(exist_ok=True)
    for index in range(SAMPLES):
        sample, plane = tiny_sample(index, SIZE), faults.get(index)
        if format_name == "npy":
            if plane is not None:
                sample.counts[plane, 0, 0, 0] = -1
            FORMATS["npy"].write(root, str(index), sample)
            continue
        # A chunk for each plane.
        start, *chunks = encode(sample, chunk_voxels=SIZE**2)
        if plane is not None:
            chunks[plane] = bytes([chunks[plane][0] ^ 1]) + chunks[plane][1:]
        write_shard(root / f"{index}.tar", [(f"{index}.packed", [start, *chunks])])
    return root


@pytest.mark.parametrize("slab", slabs(1, 2, 4), ids=str)
@pytest.mark.parametrize("format_name", IN_PART)
def test_damage_is_noticed_in_the_slab_alone(format_name: str, slab: Slab, tmp_path: Path) -> None:
    plane = 5
    split = open_folder(write_damaged(tmp_path / "data", format_name, {3: plane}))
    planes = slab_of(np.arange(SIZE).reshape(-1, 1, 1, 1), slab)
    if plane not in planes:
        load(split, slab, ragged="pad")
        return
    with pytest.raises(DataError) as raised:
        load(split, slab, ragged="pad")
    assert raised.value.path == str(split.path(3))
    assert f"chunk {plane} " in raised.value.fault or format_name == "npy"


class Group:
    """Threads in place of ranks that share samples."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30)
        self._values: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)] * size

    def agree(self, rank: int, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """See `Agree`."""
        self._values[rank] = values
        self._barrier.wait()
        found: npt.NDArray[np.int64] = np.max(self._values, axis=0)
        self._barrier.wait()
        return found

    def load(self, split: SampleDataset, slab: Slab, skipped: set[str], **options: Any) -> list[Row]:
        """Load as one of the ranks, with damaged samples skipped; add them to `skipped`."""
        agree = functools.partial(self.agree, slab.index)
        try:
            return load(split, slab, agree=agree, on_bad_sample="skip", skipped=skipped, **options)
        except BaseException:
            self._barrier.abort()
            raise


@pytest.mark.parametrize("ragged", ["drop", "pad"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("format_name", IN_PART)
def test_ranks_that_share_samples_skip_the_same(
    format_name: str, count: int, ragged: Ragged, tmp_path: Path
) -> None:
    # Consecutive samples, damaged for one rank or another, up to the last one.
    split = open_folder(write_damaged(tmp_path / "data", format_name, {1: 0, 2: 7, 3: 1, 6: 6}))
    whole_skipped: set[str] = set()
    options: dict[str, Any] = {"ragged": ragged, "epochs": 2}
    whole = load(split, None, on_bad_sample="skip", skipped=whole_skipped, **options)
    assert len(whole_skipped) == 4
    group, skipped = Group(count), [set[str]() for _ in range(count)]
    ranks = [Slab(index, count, periodic=False) for index in range(count)]
    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(lambda slab: group.load(split, slab, skipped[slab.index], **options), ranks))
    for slab, rows in zip(ranks, found, strict=True):
        assert [index for index, *_ in rows] == [index for index, *_ in whole]
        for (index, volume, target), (_, expected, expected_target) in zip(rows, whole, strict=True):
            if index >= 0:
                np.testing.assert_array_equal(volume, slab_of(expected, slab))
                np.testing.assert_array_equal(target, expected_target)
    # Each is recorded by the ranks that met the damage.
    assert set.union(*skipped) == whole_skipped
    assert {Path(path).name.split("_")[0].split(".")[0] for path in skipped[0]} == {"1", "3"}


def test_samples_of_which_every_one_is_damaged_for_some_rank_end_the_run(tmp_path: Path) -> None:
    split = open_folder(write_damaged(tmp_path / "data", "npy", {}))
    write_damaged(Path(split.root), "npy", {index: index % 2 * 7 for index in range(SAMPLES)})
    group = Group(2)
    with ThreadPoolExecutor(2) as threads:
        runs = [
            threads.submit(group.load, split, Slab(index, 2, periodic=False), set()) for index in range(2)
        ]
    errors = [run.exception() for run in runs]
    assert any(isinstance(error, DataError) and "in a row: 7" in error.fault for error in errors)


def test_lost_rank_is_not_taken_for_a_damaged_sample(tmp_path: Path) -> None:
    split = open_folder(write_damaged(tmp_path / "data", "npy", dict.fromkeys(range(3), 0)))

    def agree(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        load(split, Slab(0, 2, False), agree=agree, on_bad_sample="skip")


def test_ranks_do_not_agree_where_damage_ends_the_run(splits: dict[str, SampleDataset]) -> None:
    def agree(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        raise AssertionError

    assert load(splits["npy"], Slab(0, 2, True), agree=agree)
