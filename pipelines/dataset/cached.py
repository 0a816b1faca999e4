"""Samples that are kept on the node's own disk once they were read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import DataError
from pipelines.storage.cache import CacheConfig, CachedStorage


def cached(dataset: SampleDataset, config: CacheConfig | None) -> SampleDataset:
    """Return `dataset`, read through the cache of `config` if that is not None.

    The version of its files is that of the manifest; without one, their lengths and times or ETags now.
    """
    if config is None:
        return dataset
    root = os.path.abspath(dataset.root) if isinstance(dataset.root, Path) else dataset.root
    address = f"{root} {dataset.version or _state(dataset)}"
    return replace(dataset, storage=CachedStorage(dataset.storage, config, address))


def _state(dataset: SampleDataset) -> str:
    """Return a digest of the states of all files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in dict.fromkeys(path for index in range(len(dataset)) for path in dataset.files(index)):
        state = None
        # What cannot be accessed is reported when it is read.
        with contextlib.suppress(DataError):
            state = dataset.storage.state(path)
        digest.update(json.dumps([path.name, state]).encode())
    return digest.hexdigest()
