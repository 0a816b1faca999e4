"""The loader of a rank that shares samples with others: it delivers slabs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import slab_of, slabs, write_tiny

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import open_folder
from pipelines.errors import ConfigError
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


def load(
    split: SampleDataset,
    slab: Slab | None,
    *,
    agree: Agree | None = None,
    ragged: Ragged = "drop",
    epochs: int = 1,
    **config: Any,
) -> list[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Index, volume (D, H, W, C) and target of each row."""
    loader = Loader(
        split,
        LoaderConfig(batch_size=2, **config),
        rank_slice=RankSlice(1, 2),
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


def test_damage_in_the_slab_alone_is_named(tmp_path: Path) -> None:
    root = write_tiny(tmp_path, train=4, validation=1, size=SIZE)
    split = open_folder(root / "train")
    path = split.path(2)
    content = bytearray(path.read_bytes())
    # A negative count in plane 5.
    content[128 + 5 * SIZE**2 * 8 + 1] = 0x80
    path.write_bytes(content)
    for slab in slabs(2, 4):
        planes = range(slab.index * SIZE // slab.count - 1, (slab.index + 1) * SIZE // slab.count + 1)
        try:
            load(split, slab)
        except Exception as error:
            assert 5 in planes and getattr(error, "path", None) == str(path)
        else:
            assert 5 not in planes
