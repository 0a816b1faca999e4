"""Fetching ahead: what is read does not depend on it, and it ends when it is told to."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from helpers import tiny_sample, write_tiny

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.payload import Payload
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.storage.local import clear_open_files


def open_loader(split: SampleDataset, config: LoaderConfig) -> Loader:
    return Loader(
        split,
        config,
        rank_slice=RankSlice(0, 1),
        seed=0,
        shuffle=False,
        ragged="drop",
        device=torch.device("cpu"),
    )


def test_a_loader_closes_while_samples_wait_to_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SampleDataset.payload

    def slow(dataset: SampleDataset, index: int, **options: Any) -> Payload:
        time.sleep(0.02)
        return read(dataset, index, **options)

    monkeypatch.setattr(SampleDataset, "payload", slow)
    split = open_folder(write_tiny(tmp_path, train=16, validation=1) / "train")
    loader = open_loader(split, LoaderConfig(batch_size=8, requests_ahead=1))
    next(loader.batches(0))
    closing = Thread(target=loader.close, daemon=True)
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
        config = LoaderConfig(batch_size=4, requests_ahead=ahead, on_bad_sample="skip")
        loader = open_loader(split, config)
        read[ahead] = [batch.index.tolist() for batch in loader.batches(0)]
        assert len(loader.skipped) == 4
        loader.close()
    assert read[12] == read[0] == [[0, 1, 2, 3], [8, 8, 8, 8], [8, 9, 10, 11]]
