"""The loader, through DALI: the right samples, in the planned order, whatever the format and the ranks."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import DATA, write_tiny

from pipelines.dataset.dataset import Partition, SampleDataset
from pipelines.dataset.open import open_split
from pipelines.errors import ConfigError, DataError, UserError
from pipelines.formats.registry import FORMATS
from pipelines.loading.config import LoaderConfig
from pipelines.loading.decoders import FilesDecoder
from pipelines.loading.loader import Loader
from pipelines.plan import Ragged, RankSlice
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
def loader(
    data: Path | SampleDataset,
    *,
    batch_size: int = 2,
    rank_slice: RankSlice = RankSlice(),  # noqa: B008  (it is frozen)
    shuffle: bool = True,
    ragged: Ragged = "drop",
    seed: int = 9,
    device: str = "cpu",
    **config: Any,
) -> Iterator[Loader]:
    made = Loader(
        open_split(data, "train") if isinstance(data, Path) else data,
        LoaderConfig(batch_size=batch_size, **config),
        rank_slice=rank_slice,
        seed=seed,
        shuffle=shuffle,
        ragged=ragged,
        device=torch.device(device),
    )
    try:
        yield made
    finally:
        made.close()


Row = tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]


def rows(batches: Iterator[Batch]) -> list[Row]:
    """(sample, volume (C, D, H, W), target) of every row, copied out."""
    return [
        (int(index), volume.cpu().numpy().copy(), target.cpu().numpy().copy())
        for batch in batches
        for index, volume, target in zip(batch.index, batch.volume, batch.target, strict=True)
    ]


def same(one: list[Row], other: list[Row]) -> bool:
    return len(one) == len(other) and all(
        a[0] == b[0] and np.array_equal(a[1], b[1]) and np.array_equal(a[2], b[2])
        for a, b in zip(one, other, strict=True)
    )


def close(one: list[Row], other: list[Row]) -> bool:
    """The same, but for how a GPU rounds a quotient."""
    return len(one) == len(other) and all(
        a[0] == b[0] and np.allclose(a[1], b[1], rtol=2e-7, atol=0) and np.array_equal(a[2], b[2])
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_every_row_is_the_transformed_sample_that_its_index_names(
    format_name: str, apply_log: bool, roots: dict[str, Path]
) -> None:
    split = open_split(roots[format_name], "train")
    with loader(roots[format_name], apply_log=apply_log, ragged="pad") as batches:
        seen = [row for epoch in (0, 1) for row in rows(batches.batches(epoch)) if row[0] >= 0]
    assert sorted(index for index, _, _ in seen) == sorted([*range(SAMPLES)] * 2)
    for index, volume, target in seen:
        sample = split.read(index)
        counts = np.moveaxis(sample.counts, -1, 0).astype(np.float64)
        if apply_log:
            # Not a single bit off the logarithm as rounded from double precision.
            np.testing.assert_array_equal(volume, np.log1p(counts).astype(np.float32))
        else:
            np.testing.assert_allclose(volume, counts / counts.mean(), rtol=1e-6)
        np.testing.assert_array_equal(target, sample.target)


def test_all_formats_give_the_same_batches(roots: dict[str, Path]) -> None:
    seen = []
    for root in roots.values():
        with loader(root, batch_size=3) as batches:
            seen.append([row for epoch in range(3) for row in rows(batches.batches(epoch))])
    assert len(seen) == len(FORMATS) == 4
    assert all(same(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("folder", ["tfrecord_gzip", "tfrecord_plain"])
def test_what_tensorflow_wrote_comes_through_dali_and_through_npy_exactly(
    folder: str, tmp_path: Path
) -> None:
    with np.load(DATA / "keras_small.npz") as keras:
        counts, targets = keras["counts"], keras["targets"]
    shutil.copytree(DATA / folder, tmp_path / "tf" / "train")
    (tmp_path / "npy" / "train").mkdir(parents=True)
    split = open_split(tmp_path / "tf", "train")
    for index in range(len(split)):
        FORMATS["npy"].write(tmp_path / "npy" / "train", split.sample_id(index), split.read(index))
    for root in (tmp_path / "tf", tmp_path / "npy"):
        with loader(root, shuffle=False) as batches:
            for index, volume, target in rows(batches.batches(0)):
                back = np.expm1(np.moveaxis(volume, 0, -1).astype(np.float64))
                np.testing.assert_array_equal(np.rint(back), counts[index])
                np.testing.assert_allclose(back, counts[index], rtol=1e-5)
                np.testing.assert_array_equal(target, targets[index])


@pytest.mark.parametrize("ranks", range(1, 8))
def test_ranks_share_the_epoch_between_them(ranks: int, roots: dict[str, Path]) -> None:
    seen, steps = [], set()
    for rank in range(ranks):
        with loader(roots["npy"], batch_size=1, rank_slice=RankSlice(rank, ranks), ragged="pad") as batches:
            seen += rows(batches.batches(0))
            steps.add(len(batches))
    assert steps == {-(-SAMPLES // ranks)}
    assert sorted(index for index, _, _ in seen if index >= 0) == list(range(SAMPLES))


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("apply_log", [True, False])
def test_dali_reads_the_same_files_in_the_same_order(
    apply_log: bool, device: str, roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(batches: Loader) -> list[list[Row]]:
        # An epoch that is left behind, two whole ones, back into the first, and over its end.
        left = rows(itertools.islice(batches.batches(1), 2))
        return [left, *(rows(batches.batches(*place)) for place in ((0, 0), (1, 0), (0, 3), (1, 0)))]

    settings: tuple[dict[str, Any], ...] = (
        {"rank_slice": RankSlice(1, 2), "batch_size": 1},
        {"ragged": "pad", "batch_size": 3},
    )
    for options in settings:
        with loader(roots["npy"], apply_log=apply_log, **options) as batches:
            expected = seen(batches)
        with monkeypatch.context() as patched:
            patched.setattr("pipelines.loading.loader.make_decoder", FilesDecoder)
            with loader(roots["npy"], apply_log=apply_log, device=device, **options) as batches:
                found = seen(batches)
        for one, other in zip(found, expected, strict=True):
            real = [row for row in one if row[0] >= 0], [row for row in other if row[0] >= 0]
            assert len(one) == len(other) > 0 and close(*real)


@pytest.mark.gpu
def test_on_a_gpu_it_is_an_option(roots: dict[str, Path]) -> None:
    with loader(roots["npy"]) as batches:
        expected = rows(batches.batches(0))
    with loader(roots["npy"], gpu_direct=True, device="cuda:0") as batches:
        assert close(rows(batches.batches(0)), expected)


def test_a_file_that_dali_cannot_read_is_named_though_it_reads_ahead(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.loading.loader.make_decoder", FilesDecoder)
    shutil.copytree(roots["npy"], tmp_path / "data")
    with loader(tmp_path / "data", shuffle=False, batch_size=1) as batches:
        culprit = batches.split.path(3)
        culprit.write_bytes(culprit.read_bytes()[:-100])
        with pytest.raises(DataError, match=culprit.name):
            rows(batches.batches(0))


def test_gpu_direct_is_refused_where_it_is_impossible(roots: dict[str, Path]) -> None:
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("npy", {}, "loader.gpu_direct"),
        ("packed", {}, "loader.gpu_direct"),
        ("npy", {"on_bad_sample": "skip"}, "gpu_direct"),
        ("npy", {"direct_io": True}, "gpu_direct"),
    )
    for format_name, options, key in cases:
        with pytest.raises(ConfigError) as raised, loader(roots[format_name], gpu_direct=True, **options):
            pass
        assert raised.value.key == key


def test_two_ranks_make_up_the_batches_of_one(roots: dict[str, Path]) -> None:
    with loader(roots["npy"], batch_size=4) as batches:
        whole = [rows(iter([batch])) for batch in batches.batches(1)]
    halves = []
    for rank in range(2):
        with loader(roots["npy"], batch_size=2, rank_slice=RankSlice(rank, 2)) as batches:
            halves.append([rows(iter([batch])) for batch in batches.batches(1)])
    assert len(whole) == len(halves[0]) == len(halves[1]) == SAMPLES // 4
    for step, left, right in zip(whole, *halves, strict=True):
        assert same(step, left + right)


def test_a_resume_is_the_same_plan_from_a_later_place(roots: dict[str, Path]) -> None:
    with loader(roots["tfrecord_gzip"]) as batches:
        epochs = [[rows(iter([batch])) for batch in batches.batches(epoch)] for epoch in range(3)]
        # Back to the middle of an earlier epoch, in the same loader, with others in flight.
        again = [rows(iter([batch])) for batch in batches.batches(1, 2)]
        assert all(same(a, b) for a, b in zip(again, epochs[1][2:], strict=True))
        partly = batches.batches(2)
        next(partly)
        again = [rows(iter([batch])) for batch in batches.batches(0, 4)]
        assert all(same(a, b) for a, b in zip(again, epochs[0][4:], strict=True))
    with loader(roots["tfrecord_gzip"]) as batches:
        fresh = [rows(iter([batch])) for batch in batches.batches(2, 3)]
    assert all(same(a, b) for a, b in zip(fresh, epochs[2][3:], strict=True))


def test_filling_rows_are_marked_and_come_last(roots: dict[str, Path]) -> None:
    with loader(roots["npy"], batch_size=4, ragged="pad", shuffle=False) as batches:
        *full, last = [batch.index.tolist() for batch in batches.batches(0)]
    assert full == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert last == [8, 9, 10, -1]


@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("format_name", ["npy", "packed"])
def test_a_share_of_no_samples_takes_part_in_every_step(
    format_name: str, apply_log: bool, roots: dict[str, Path]
) -> None:
    nothing = np.arange(0)
    whole = open_split(roots[format_name], "validation")
    with loader(
        whole.subset(nothing, Partition(nothing, count=3, total=2, seed=None)),
        ragged="pad",
        apply_log=apply_log,
    ) as batches:
        for epoch in (0, 1):
            (batch,) = batches.batches(epoch)
            assert batch.index.tolist() == [-1, -1] and batch.volume.isfinite().all()


def test_the_network_gets_a_channels_last_view(roots: dict[str, Path]) -> None:
    with loader(roots["npy"]) as batches:
        batch = next(batches.batches(0))
        assert batch.volume.shape == (2, 4, SIZE, SIZE, SIZE)
        assert batch.volume.dtype == batch.target.dtype == torch.float32
        assert batch.volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_batch_can_be_written_into_a_given_one(roots: dict[str, Path]) -> None:
    shape = (2, 4, SIZE, SIZE, SIZE)
    volume = torch.zeros(shape).contiguous(memory_format=torch.channels_last_3d)
    into = Batch(volume, torch.zeros(2, 4), np.zeros(2, np.int64))
    with loader(roots["npy"]) as batches:
        expected = rows(batches.batches(0))
    seen = []
    with loader(roots["npy"]) as batches:
        for batch in batches.batches(0, into=into):
            assert batch.volume.data_ptr() == volume.data_ptr()
            assert batch.target.data_ptr() == into.target.data_ptr()
            seen += rows(iter([batch]))
    assert same(seen, expected)


@pytest.mark.parametrize("config", [{"threads": 1, "prefetch": 1}, {"threads": 4, "prefetch": 3}])
def test_threads_and_prefetch_change_no_batch(config: dict[str, Any], roots: dict[str, Path]) -> None:
    with loader(roots["npy"]) as batches:
        expected = rows(batches.batches(0)) + rows(batches.batches(1))
    with loader(roots["npy"], **config) as batches:
        assert same(rows(batches.batches(0)) + rows(batches.batches(1)), expected)


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_a_file_that_goes_bad_is_named_when_it_is_read(
    format_name: str, roots: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(roots[format_name], tmp_path / "data")
    with loader(tmp_path / "data", shuffle=False, batch_size=1) as batches:
        culprit = batches.split.files(7)[-1]
        culprit.write_bytes(culprit.read_bytes()[: culprit.stat().st_size // 2])
        with pytest.raises(DataError, match=culprit.name):
            rows(batches.batches(0))


def test_a_file_that_vanishes_is_named(roots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(roots["npy"], tmp_path / "data")
    with loader(tmp_path / "data", shuffle=False, batch_size=1) as batches:
        batches.split.path(7).unlink()
        with pytest.raises(DataError, match=batches.split.names[7]):
            rows(batches.batches(0))


@pytest.mark.parametrize("apply_log", [True, False])
def test_a_count_below_zero_becomes_no_number_and_is_explained(
    apply_log: bool, roots: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(roots["npy"], tmp_path / "data")
    with loader(tmp_path / "data", shuffle=False, batch_size=1, apply_log=apply_log) as batches:
        good = batches.split.read(5)
        bad = Sample(np.where(np.arange(4) == 2, np.int16(-30000), good.counts), good.target)
        FORMATS["npy"].write(batches.split.root, batches.split.sample_id(5), bad)
        for index, volume, _ in rows(batches.batches(0)):
            assert np.isnan(volume).any() == (index == 5)
        with pytest.raises(DataError, match="a count is -30000"):
            batches.raise_if_damaged(np.array([4, 5, -1]))
        batches.raise_if_damaged(np.array([4, 6, -1]))


def test_more_ranks_than_samples_is_refused(roots: dict[str, Path]) -> None:
    with (
        pytest.raises(UserError, match="11 training samples"),
        loader(roots["npy"], rank_slice=RankSlice(0, 12)),
    ):
        pass


def test_settings_below_one_are_refused_by_name() -> None:
    for key in ("batch_size", "threads", "prefetch"):
        with pytest.raises(ConfigError) as raised:
            LoaderConfig(**{key: 0})  # type: ignore[arg-type]
        assert raised.value.key == key
