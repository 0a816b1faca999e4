"""Samples read through the node's cache: the same ones, and from the second time on without their files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import SIZE, tiny_sample

from pipelines.dataset.cached import cached
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.manifest import MANIFEST, Entry, Manifest
from pipelines.dataset.open import open_folder
from pipelines.errors import DataError
from pipelines.formats.packed import decode
from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.registry import FORMATS
from pipelines.sample import SampleSpec
from pipelines.slab import Slab
from pipelines.storage import cache
from pipelines.storage.cache import CacheConfig
from pipelines.storage.local import clear_open_files

SLABS = (None, Slab(1, 2, periodic=True))


@pytest.fixture(autouse=True)
def _opened_anew() -> Iterator[None]:
    cache._entries.cache_clear()
    yield
    cache._entries.cache_clear()


def write_samples(folder: Path, format_name: str, *numbers: int, with_manifest: bool = True) -> Path:
    """A folder of tiny samples of these numbers."""
    folder.mkdir(exist_ok=True)
    written = [FORMATS[format_name].write(folder, f"s{k}", tiny_sample(n)) for k, n in enumerate(numbers)]
    if with_manifest:
        entries = tuple(Entry.from_written(f"s{k}", files) for k, files in enumerate(written))
        Manifest(format_name, SampleSpec(SIZE), entries).save(folder)
    return folder


def payloads(dataset: SampleDataset) -> list[bytes]:
    """Counts and targets of all samples and, where parts can be read, of slabs of them."""
    found = []
    for slab in SLABS if dataset.format_name in ("npy", "packed") else SLABS[:1]:
        for index in range(len(dataset)):
            payload = dataset.payload(index, slab=slab)
            counts = payload.decode() if isinstance(payload, PackedSample) else payload.counts
            found += [np.ascontiguousarray(counts).tobytes(), payload.target.tobytes()]
    return found


def remove_samples(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != MANIFEST:
            path.unlink()
    clear_open_files()


@pytest.mark.parametrize("format_name", ["packed", "npy", "tfrecord", "tfrecord_gzip"])
def test_reads_each_sample_once(format_name: str, tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "train", format_name, 1, 2, 3)
    config = CacheConfig(str(tmp_path / "cache"), "1 GB")
    expected = payloads(open_folder(folder))
    # What else the process has read has no influence.
    decode._LONGEST_START.clear()
    dataset = cached(open_folder(folder), config)
    assert payloads(dataset) == expected
    remove_samples(folder)
    assert payloads(dataset) == expected
    # As a new run does, which knows the manifest alone.
    assert payloads(cached(open_folder(folder), config)) == expected


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_changed_file_is_another_one(with_manifest: bool, tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "train", "npy", 1, 2, with_manifest=with_manifest)
    config = CacheConfig(str(tmp_path / "cache"), "1 GB")
    before = payloads(cached(open_folder(folder), config))
    write_samples(folder, "npy", 7, 2, with_manifest=with_manifest)
    after = payloads(cached(open_folder(folder), config))
    assert after[0] == tiny_sample(7).counts.tobytes()
    assert after[2:4] == before[2:4]


def test_what_is_not_in_the_manifest_is_refused_each_time(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "train", "npy", 1, 2)
    path = min(folder.glob("*_data.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    dataset = cached(open_folder(folder), CacheConfig(str(tmp_path / "cache"), "1 GB"))
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            dataset.payload(0)
        assert caught.value.path == str(path)
    content[-1] ^= 1
    path.write_bytes(content)
    assert dataset.read(0).counts.tobytes() == bytes(content[128:])
