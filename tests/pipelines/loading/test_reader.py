"""What is read in the place of a damaged sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_tiny

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder, open_split
from pipelines.errors import DataError
from pipelines.formats.base import CountsPayload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.loading.reader import Reader
from pipelines.loading.transforms import transform
from pipelines.plan import Ragged, RankSlice
from preprocess.convert import convert


@pytest.fixture
def split(tmp_path: Path) -> SampleDataset:
    """Eight samples, of which 2, 3 and 7 are damaged."""
    found = open_split(write_tiny(tmp_path, train=8, validation=1), "train")
    for index in (2, 3, 7):
        found.path(index).write_bytes(b"no")
    return found


def test_the_next_sound_one(split: SampleDataset) -> None:
    reader = Reader(split, "skip")
    assert [reader.payload(index)[0] for index in range(8)] == [0, 1, 4, 4, 4, 5, 6, 0]
    _, payload = reader.payload(2)
    assert isinstance(payload, CountsPayload)
    np.testing.assert_array_equal(payload.counts, split.read(4).counts)
    assert reader.skipped.keys() == {str(split.path(index)) for index in (2, 3, 7)}
    assert reader.sample(2) is None and reader.sample(4) is not None


def test_nothing_is_skipped_unless_asked(split: SampleDataset) -> None:
    reader = Reader(split)
    with pytest.raises(DataError, match="universe_0002"):
        reader.payload(2)
    with pytest.raises(DataError, match="universe_0002"):
        reader.sample(2)


def test_a_shard_that_is_lost_or_cut_off_is_passed_over_whole(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "npy", train=60, validation=1)
    assert convert(source / "train", tmp_path / "packed", "packed", workers=1, a_shard=20) == 0
    packed = open_folder(tmp_path / "packed")
    packed.files(0)[0].unlink()
    packed.files(20)[0].write_bytes(b"no")
    reader = Reader(packed, "skip")
    assert reader.payload(0)[0] == reader.payload(39)[0] == 40
    assert len(reader.skipped) == 40
    packed.files(40)[0].write_bytes(b"no")
    with pytest.raises(DataError, match="this sample and the next 59 are damaged"):
        reader.payload(0)


@pytest.mark.parametrize(
    ("ragged", "expected"), [("drop", [[0, 1, 4, 4], [4, 5, 6, 0]]), ("pad", [[0, 1, -1, -1], [4, 5, 6, -1]])]
)
def test_training_takes_another_and_validation_leaves_it_out(
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
