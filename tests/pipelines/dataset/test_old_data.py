"""Data sets that version 0.1 wrote are still read.

`tests/data/before_0_2/npy` and `packed` hold the same three samples of 8^3, with manifests and lists.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers import DATA

from pipelines.dataset.manifest import MANIFEST, Manifest
from pipelines.dataset.open import open_folder
from preprocess.verify import main

BEFORE = DATA / "before_0_2"


def test_old_data_sets_verify_and_hold_the_same_samples(tmp_path: Path) -> None:
    npy, packed = open_folder(BEFORE / "npy"), open_folder(BEFORE / "packed")
    assert [npy.sample_id(i) for i in range(3)] == [packed.sample_id(i) for i in range(3)]
    assert packed.entry_names == ["shard_000000", "shard_000001"]
    for index in range(3):
        one, other = npy.read(index, verify=True), packed.read(index, verify=True)
        np.testing.assert_array_equal(one.counts, np.load(npy.path(index)))
        np.testing.assert_array_equal(one.counts, other.counts)
        np.testing.assert_array_equal(one.target, other.target)
    for dataset in (npy, packed):
        assert main([str(dataset.root), "--workers", "1"]) == 0
        manifest = Manifest.load(dataset.root)
        assert manifest is not None
        manifest.save(tmp_path)
        assert (tmp_path / MANIFEST).read_bytes() == Path(dataset.root / MANIFEST).read_bytes()
