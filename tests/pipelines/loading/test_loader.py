"""The loader delivers the planned samples in the planned order, for every format and number of ranks."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import DATA, write_tiny

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.errors import ConfigError, DataError, UserError
from pipelines.formats.registry import FORMATS
from pipelines.loading.config import LoaderConfig
from pipelines.loading.decoders import FilesDecoder
from pipelines.loading.loader import Loader
from pipelines.plan import Partition, Ragged, RankSlice, plan_epoch
from pipelines.sample import Batch, Sample

SAMPLES, SIZE = 11, 8


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same samples in every format."""
    return {
        format_name: write_tiny(
            tmp_path_factory.mktemp(format_name),
            train=SAMPLES,
            validation=1,
            format_name=format_name,
            size=SIZE,
        )
        for format_name in FORMATS
    }


@contextmanager
def open_loader(
    data: Path | SampleDataset,
    *,
    batch_size: int = 2,
    rank_slice: RankSlice = RankSlice(),  # noqa: B008  (it is frozen)
    shuffle: bool = True,
    ragged: Ragged = "drop",
    device: str = "cpu",
    **config: Any,
) -> Iterator[Loader]:
    loader = Loader(
        open_folder(data / "train") if isinstance(data, Path) else data,
        LoaderConfig(batch_size=batch_size, **config),
        rank_slice=rank_slice,
        seed=9,
        shuffle=shuffle,
        ragged=ragged,
        device=torch.device(device),
    )
    try:
        yield loader
    finally:
        loader.close()


Row = tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]


def rows(batches: Iterator[Batch]) -> list[Row]:
    """Copies of (index, volume (C, D, H, W), target) of every row."""
    return [
        (int(index), volume.cpu().numpy().copy(), target.cpu().numpy().copy())
        for batch in batches
        for index, volume, target in zip(batch.index, batch.volume, batch.target, strict=True)
    ]


def steps(batches: Iterator[Batch]) -> list[list[Row]]:
    """The same, one list for each batch."""
    return [rows(iter([batch])) for batch in batches]


def equal(one: list[Row], other: list[Row], rtol: float = 0.0) -> bool:
    """Compare rows, volumes up to a relative difference of `rtol`."""
    return len(one) == len(other) and all(
        a[0] == b[0] and np.allclose(a[1], b[1], rtol=rtol, atol=0) and np.array_equal(a[2], b[2])
        for a, b in zip(one, other, strict=True)
    )


def files_decoder(
    split: SampleDataset, config: LoaderConfig, device: torch.device, slab: None
) -> FilesDecoder:
    """In place of `make_decoder`, which makes one on a GPU alone."""
    return FilesDecoder(split, config, device)


GPU_ROUNDING = 2e-7
"""Relative difference of a quotient on a GPU."""


@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_each_row_is_the_transformed_sample_of_its_index(
    format_name: str, apply_log: bool, roots: dict[str, Path]
) -> None:
    split = open_folder(roots[format_name] / "train")
    with open_loader(split, apply_log=apply_log, ragged="pad") as loader:
        seen = [row for epoch in (0, 1) for row in rows(loader.batches(epoch)) if row[0] >= 0]
    assert sorted(index for index, _, _ in seen) == sorted([*range(SAMPLES)] * 2)
    for index, volume, target in seen:
        sample = split.read(index)
        counts = np.moveaxis(sample.counts, -1, 0).astype(np.float64)
        if apply_log:
            # Exactly the logarithm rounded from double precision.
            np.testing.assert_array_equal(volume, np.log1p(counts).astype(np.float32))
        else:
            np.testing.assert_allclose(volume, counts / counts.mean(), rtol=1e-6)
        np.testing.assert_array_equal(target, sample.target)


def test_order_equals_plan_epoch(roots: dict[str, Path]) -> None:
    for rank_slice in (RankSlice(0, 2), RankSlice(1, 2)):
        with open_loader(roots["npy"], rank_slice=rank_slice) as loader:
            for epoch in range(3):
                plan = plan_epoch(SAMPLES, global_batch=4, seed=9, epoch=epoch, shuffle=True, ragged="drop")
                indices = [batch.index.tolist() for batch in loader.batches(epoch)]
                assert indices == rank_slice.select(plan).tolist()


def test_all_formats_give_the_same_batches(roots: dict[str, Path]) -> None:
    seen = []
    for root in roots.values():
        with open_loader(root, batch_size=3) as loader:
            seen.append([row for epoch in range(3) for row in rows(loader.batches(epoch))])
    assert len(seen) == len(FORMATS) == 4
    assert all(equal(seen[0], other) for other in seen[1:])


def test_files_of_tensorflow_give_exact_volumes_directly_and_as_npy(tmp_path: Path) -> None:
    with np.load(DATA / "keras_small.npz") as keras:
        counts, targets = keras["counts"], keras["targets"]
    for folder in ("tfrecord_gzip", "tfrecord_plain"):
        original, npy = tmp_path / folder / "train", tmp_path / folder / "npy" / "train"
        shutil.copytree(DATA / folder, original)
        npy.mkdir(parents=True)
        split = open_folder(original.parent / "train")
        for index in range(len(split)):
            FORMATS["npy"].write(npy, split.sample_id(index), split.read(index))
        for root in (original.parent, npy.parent):
            with open_loader(root, shuffle=False) as loader:
                for index, volume, target in rows(loader.batches(0)):
                    back = np.expm1(np.moveaxis(volume, 0, -1).astype(np.float64))
                    np.testing.assert_array_equal(np.rint(back), counts[index])
                    np.testing.assert_allclose(back, counts[index], rtol=1e-5)
                    np.testing.assert_array_equal(target, targets[index])


def test_ranks_together_read_each_sample_once(roots: dict[str, Path]) -> None:
    for ranks in range(1, 8):
        seen, lengths = [], set()
        for rank in range(ranks):
            rank_slice = RankSlice(rank, ranks)
            with open_loader(roots["npy"], batch_size=1, rank_slice=rank_slice, ragged="pad") as loader:
                seen += rows(loader.batches(0))
                lengths.add(len(loader))
        assert lengths == {-(-SAMPLES // ranks)}
        assert sorted(index for index, _, _ in seen if index >= 0) == list(range(SAMPLES))


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("apply_log", [True, False])
def test_files_that_dali_reads_come_in_the_same_order(
    apply_log: bool, device: str, roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(loader: Loader) -> list[list[Row]]:
        # An epoch that is abandoned, two whole ones, a seek into the first, and over its end.
        abandoned = rows(itertools.islice(loader.batches(1), 2))
        positions = ((0, 0), (1, 0), (0, 3), (1, 0))
        return [abandoned, *(rows(loader.batches(*position)) for position in positions)]

    settings: tuple[dict[str, Any], ...] = (
        {"rank_slice": RankSlice(1, 2), "batch_size": 1},
        {"ragged": "pad", "batch_size": 3},
    )
    for options in settings:
        with open_loader(roots["npy"], apply_log=apply_log, **options) as loader:
            expected = read(loader)
        with monkeypatch.context() as patched:
            patched.setattr("pipelines.loading.loader.make_decoder", files_decoder)
            with open_loader(roots["npy"], apply_log=apply_log, device=device, **options) as loader:
                found = read(loader)
        for one, other in zip(found, expected, strict=True):
            real = [row for row in one if row[0] >= 0], [row for row in other if row[0] >= 0]
            assert len(one) == len(other) > 0 and equal(*real, rtol=GPU_ROUNDING)


@pytest.mark.gpu
def test_gpu_direct_gives_the_same_batches(roots: dict[str, Path]) -> None:
    with open_loader(roots["npy"]) as loader:
        expected = rows(loader.batches(0))
    with open_loader(roots["npy"], gpu_direct=True, device="cuda:0") as loader:
        assert equal(rows(loader.batches(0)), expected, rtol=GPU_ROUNDING)


def test_gpu_direct_is_refused_where_it_is_impossible(roots: dict[str, Path]) -> None:
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("npy", {}, "loader.gpu_direct"),
        ("packed", {}, "loader.gpu_direct"),
        ("npy", {"on_bad_sample": "skip"}, "gpu_direct"),
        ("npy", {"direct_io": True}, "gpu_direct"),
    )
    for format_name, options, key in cases:
        with (
            pytest.raises(ConfigError) as raised,
            open_loader(roots[format_name], gpu_direct=True, **options),
        ):
            pass
        assert raised.value.key == key


def test_two_ranks_read_the_batches_of_one(roots: dict[str, Path]) -> None:
    with open_loader(roots["npy"], batch_size=4) as loader:
        whole = steps(loader.batches(1))
    halves = []
    for rank in range(2):
        with open_loader(roots["npy"], batch_size=2, rank_slice=RankSlice(rank, 2)) as loader:
            halves.append(steps(loader.batches(1)))
    assert len(whole) == len(halves[0]) == len(halves[1]) == SAMPLES // 4
    for step, left, right in zip(whole, *halves, strict=True):
        assert equal(step, left + right)


@pytest.mark.parametrize("format_name", ["packed", "tfrecord_gzip"])
def test_resume_continues_from_the_same_step(format_name: str, roots: dict[str, Path]) -> None:
    with open_loader(roots[format_name]) as loader:
        epochs = [steps(loader.batches(epoch)) for epoch in range(3)]
        # In the same loader, while other steps are in flight.
        again = steps(loader.batches(1, 2))
        assert all(equal(a, b) for a, b in zip(again, epochs[1][2:], strict=True))
        next(loader.batches(2))
        again = steps(loader.batches(0, 4))
        assert all(equal(a, b) for a, b in zip(again, epochs[0][4:], strict=True))
    for step in range(len(epochs[2])):
        with open_loader(roots[format_name]) as loader:
            fresh = steps(loader.batches(2, step))
        assert all(equal(a, b) for a, b in zip(fresh, epochs[2][step:], strict=True))


def test_padding_rows_come_last_with_index_minus_one(roots: dict[str, Path]) -> None:
    with open_loader(roots["npy"], batch_size=4, ragged="pad", shuffle=False) as loader:
        indices = [batch.index.tolist() for batch in loader.batches(0)]
    assert indices == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]]


@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("format_name", ["npy", "packed"])
def test_a_partition_without_samples_gives_finite_padding(
    format_name: str, apply_log: bool, roots: dict[str, Path]
) -> None:
    none = np.arange(0)
    whole = open_folder(roots[format_name] / "validation")
    partition = whole.subset(none, Partition(none, count=3, total=2, seed=None))
    with open_loader(partition, ragged="pad", apply_log=apply_log) as loader:
        for epoch in (0, 1):
            (batch,) = loader.batches(epoch)
            assert batch.index.tolist() == [-1, -1]
            assert batch.volume.isfinite().all() and batch.target.isfinite().all()


def test_volumes_are_channels_last_views(roots: dict[str, Path]) -> None:
    for format_name in ("npy", "packed"):
        with open_loader(roots[format_name]) as loader:
            batch = next(loader.batches(0))
            assert batch.volume.shape == (2, 4, SIZE, SIZE, SIZE) and batch.target.shape == (2, 4)
            assert batch.volume.dtype == batch.target.dtype == torch.float32
            assert batch.index.shape == (2,) and batch.index.dtype == np.int64
            assert batch.volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_batches_are_written_into_given_tensors(roots: dict[str, Path]) -> None:
    shape = (2, 4, SIZE, SIZE, SIZE)
    volume = torch.zeros(shape).contiguous(memory_format=torch.channels_last_3d)
    into = Batch(volume, torch.zeros(2, 4), np.zeros(2, np.int64))
    for format_name in ("npy", "packed"):
        with open_loader(roots[format_name]) as loader:
            expected = rows(loader.batches(0))
            seen = []
            for batch in loader.batches(1, into=into):
                assert batch.volume.data_ptr() == volume.data_ptr()
                assert batch.target.data_ptr() == into.target.data_ptr()
            for batch in loader.batches(0, into=into):
                seen += rows(iter([batch]))
        assert equal(seen, expected)


def test_threads_and_prefetch_change_no_batch(roots: dict[str, Path]) -> None:
    for format_name in ("npy", "packed"):
        with open_loader(roots[format_name]) as loader:
            expected = rows(loader.batches(0)) + rows(loader.batches(1))
        for threads, prefetch in ((1, 1), (4, 3)):
            with open_loader(roots[format_name], threads=threads, prefetch=prefetch) as loader:
                assert equal(rows(loader.batches(0)) + rows(loader.batches(1)), expected)


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_a_file_damaged_after_opening_is_named(
    format_name: str, roots: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(roots[format_name], tmp_path / "data")
    with open_loader(tmp_path / "data", shuffle=False, batch_size=1) as loader:
        damaged = Path(loader.split.files(7)[-1])
        content = damaged.read_bytes()
        damaged.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError) as raised:
            rows(loader.batches(0))
        assert Path(raised.value.path).is_relative_to(damaged)
        damaged.write_bytes(content)
        assert [index for index, _, _ in rows(loader.batches(0))] == list(range(SAMPLES))


@pytest.mark.parametrize("length", [0, 200])
def test_a_file_cut_off_after_it_was_mapped_is_named(
    length: int, roots: dict[str, Path], tmp_path: Path
) -> None:
    # Access to a map beyond the end of its file ends the process with SIGBUS.
    shutil.copytree(roots["npy"], tmp_path / "data")
    with open_loader(tmp_path / "data", shuffle=False, batch_size=1) as loader:
        batches = loader.batches(0)
        next(batches)
        step = loader._reading[-1]
        ((index, _),) = [read.result() for read in step.reads]
        damaged = loader.split.path(index)
        os.truncate(damaged, length)
        with pytest.raises(DataError) as raised:
            rows(batches)
        assert raised.value.path == str(damaged)


def test_a_file_that_disappears_is_named(roots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(roots["npy"], tmp_path / "data")
    with open_loader(tmp_path / "data", shuffle=False, batch_size=1) as loader:
        missing = Path(loader.split.path(7))
        missing.unlink()
        with pytest.raises(DataError) as raised:
            rows(loader.batches(0))
        assert raised.value.path == str(missing)


def test_a_file_that_dali_cannot_read_is_named_although_it_reads_ahead(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.loading.loader.make_decoder", files_decoder)
    shutil.copytree(roots["npy"], tmp_path / "data")
    with open_loader(tmp_path / "data", shuffle=False, batch_size=1) as loader:
        damaged = Path(loader.split.path(3))
        damaged.write_bytes(damaged.read_bytes()[:-100])
        with pytest.raises(DataError) as raised:
            rows(loader.batches(0))
        assert raised.value.path == str(damaged)


def test_a_negative_count_becomes_nan_and_its_sample_is_found(roots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(roots["npy"], tmp_path / "data")
    split = open_folder(tmp_path / "data" / "train")
    valid = split.read(5)
    damaged = Sample(np.where(np.arange(4) == 2, np.int16(-30000), valid.counts), valid.target)
    FORMATS["npy"].write(split.root, split.sample_id(5), damaged)
    for apply_log in (True, False):
        with open_loader(split, shuffle=False, batch_size=1, apply_log=apply_log) as loader:
            for index, volume, _ in rows(loader.batches(0)):
                assert np.isnan(volume).any() == (index == 5)
            with pytest.raises(DataError, match="-30000") as raised:
                loader.raise_if_damaged(np.array([4, 5, -1]))
            assert raised.value.path == str(split.path(5))
            loader.raise_if_damaged(np.array([4, 6, -1]))


def test_more_ranks_than_samples_are_refused(roots: dict[str, Path]) -> None:
    with (
        pytest.raises(UserError, match="11 training samples"),
        open_loader(roots["npy"], rank_slice=RankSlice(0, 12)),
    ):
        pass


def test_settings_below_one_are_refused() -> None:
    for key in ("batch_size", "threads", "prefetch"):
        with pytest.raises(ConfigError) as raised:
            LoaderConfig(**{key: 0})  # type: ignore[arg-type]
        assert raised.value.key == key


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="another system than Linux")
def test_threads_that_read_take_the_processor_from_no_other_thread(roots: dict[str, Path]) -> None:
    with open_loader(roots["npy"]) as loader:
        next(iter(loader.batches(0)))
        readers = [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
        assert readers
        assert {os.sched_getscheduler(thread.native_id or 0) for thread in readers} == {os.SCHED_BATCH}
        assert os.sched_getscheduler(0) != os.SCHED_BATCH
