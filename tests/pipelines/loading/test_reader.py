"""Reading of samples: damaged ones raise, or are skipped and replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_sample, write_tiny

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.errors import DataError
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.payload import CountsPayload
from pipelines.formats.registry import FORMATS
from pipelines.loading.config import LoaderConfig
from pipelines.loading.input_stats import input_statistics
from pipelines.loading.loader import Loader
from pipelines.loading.reader import Reader
from pipelines.loading.transforms import transform
from pipelines.plan import Ragged, RankSlice
from pipelines.sample import Sample
from pipelines.storage.local import clear_open_files


@pytest.fixture
def split(tmp_path: Path) -> SampleDataset:
    """Eight samples, of which 2, 3 and 7 are damaged."""
    dataset = open_folder(write_tiny(tmp_path, train=8, validation=1) / "train")
    for index in (2, 3, 7):
        Path(dataset.path(index)).write_bytes(b"no")
    return dataset


def test_skip_reads_the_next_valid_sample(split: SampleDataset) -> None:
    reader = Reader(split, "skip")
    assert [reader.payload(index)[0] for index in range(8)] == [0, 1, 4, 4, 4, 5, 6, 0]
    _, payload = reader.payload(2)
    assert isinstance(payload, CountsPayload)
    np.testing.assert_array_equal(payload.counts, split.read(4).counts)
    assert reader.skipped.keys() == {str(split.path(index)) for index in (2, 3, 7)}
    assert reader.sample(2) is None and reader.sample(4) is not None


def test_fail_raises_for_a_damaged_sample(split: SampleDataset) -> None:
    reader = Reader(split)
    for read in (reader.payload, reader.sample):
        with pytest.raises(DataError) as raised:
            read(2)
        assert raised.value.path == str(split.path(2))


def test_missing_and_damaged_shards_are_skipped_as_a_whole(tmp_path: Path) -> None:
    for shard in range(3):
        samples = range(20 * shard, 20 * shard + 20)
        members = [(f"{index:04d}.packed", encode(tiny_sample(index, size=2))) for index in samples]
        write_shard(tmp_path / f"{shard}.tar", members)
    packed = open_folder(tmp_path)
    # Opening the folder has read sample 0, and its shard is still open.
    clear_open_files()
    Path(packed.files(0)[0]).unlink()
    Path(packed.files(20)[0]).write_bytes(b"no")
    reader = Reader(packed, "skip")
    assert reader.payload(0)[0] == reader.payload(39)[0] == 40
    assert len(reader.skipped) == 40
    Path(packed.files(40)[0]).write_bytes(b"no")
    with pytest.raises(DataError, match="unusable samples in a row: 60") as raised:
        reader.payload(0)
    assert Path(packed.path(0)).is_relative_to(raised.value.path)


def test_the_reason_why_no_sample_can_be_used_is_that_of_the_first(tmp_path: Path) -> None:
    for index in range(3):
        counts = np.zeros_like(tiny_sample(index).counts)
        FORMATS["npy"].write(tmp_path, str(index), Sample(counts, tiny_sample(index).target))
    reader = Reader(open_folder(tmp_path), "skip", apply_log=False)
    for read in (lambda: reader.payload(1), lambda: input_statistics(reader, apply_log=False)):
        with pytest.raises(DataError, match=r"no particles.*loader.apply_log"):
            read()
    # Nothing is wrong with the files: another setting reads them.
    assert Reader(reader.split, "skip").payload(1)[0] == 1


@pytest.mark.parametrize(
    ("ragged", "expected"), [("drop", [[0, 1, 4, 4], [4, 5, 6, 0]]), ("pad", [[0, 1, -1, -1], [4, 5, 6, -1]])]
)
def test_training_replaces_damaged_samples_and_validation_marks_them(
    ragged: Ragged, expected: list[list[int]], split: SampleDataset
) -> None:
    loader = Loader(
        split,
        LoaderConfig(batch_size=4, on_bad_sample="skip"),
        rank_slice=RankSlice(),
        seed=0,
        shuffle=False,
        ragged=ragged,
        device=torch.device("cpu"),
    )
    try:
        for batch, rows in zip(loader.batches(0), expected, strict=True):
            assert batch.index.tolist() == rows
            for row, index in enumerate(rows):
                if index >= 0:
                    sample = split.read(index)
                    np.testing.assert_array_equal(batch.target[row].numpy(), sample.target)
                    volume = batch.volume[row].permute(1, 2, 3, 0).numpy()
                    np.testing.assert_allclose(volume, transform(sample.counts, apply_log=True), atol=1e-6)
        assert len(loader.skipped) == 3
    finally:
        loader.close()
