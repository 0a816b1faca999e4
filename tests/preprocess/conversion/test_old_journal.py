"""Half-done conversions from before version 0.2, whose journals do not hold the settings of the job.

`tests/data/before_0_2` holds six gzip TFRecords of 8^3 and two target folders as a killed run left them:
samples 0 to 2 (npy) or shard 0 (packed) are finished, and the next one is begun, with all its files there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, program

from pipelines.dataset.manifest import MANIFEST
from pipelines.dataset.open import open_folder

BEFORE = DATA / "before_0_2"
SOURCE_TIME = 1_700_000_000_000_000_000
"""Modification time in ns that the recorded source fingerprints are of; git does not keep it."""


@pytest.mark.usefixtures("inline_workers")
@pytest.mark.parametrize(
    ("to", "finished"),
    [
        ("npy", ["universe_0000_000_data.npy", "universe_0001_000_data.npy", "universe_0002_000_label.npy"]),
        ("packed", ["shard_000000.tar", "shard_000000.idx"]),
    ],
)
def test_old_journal_resumes(to: str, finished: list[str], tmp_path: Path) -> None:
    source, target, fresh = tmp_path / "source", tmp_path / "target", tmp_path / "fresh"
    shutil.copytree(BEFORE / "source", source)
    shutil.copytree(BEFORE / f"journal_{to}", target)
    for path in source.iterdir():
        os.utime(path, ns=(SOURCE_TIME, SOURCE_TIME))
    before = {path.name: path.stat().st_ino for path in target.iterdir()}
    for folder in (target, fresh):
        arguments = ["-i", source, "-o", folder, "--to", to, "--samples-per-shard", 2]
        done = program("preprocess.convert", *arguments)
        assert done.code == 0, done.err
    # A file that is written again is another one.
    after = {path.name: path.stat().st_ino for path in target.iterdir()}
    samples = [name for name in before if name.endswith((".npy", ".tar", ".idx"))]
    up_to_date = [name for name in samples if after[name] == before[name]]
    assert set(finished) <= set(up_to_date) and len(up_to_date) == len(samples) - 2
    # Shards that were finished are of an older version of the packed format.
    kept = [*up_to_date, MANIFEST] if to == "packed" else []
    found, expected = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in kept}
        for folder in (target, fresh)
    )
    assert found == expected and len(found) > 2
    one, other = open_folder(target), open_folder(fresh)
    for index in range(6):
        mine, same = one.read(index, verify=True), other.read(index, verify=True)
        np.testing.assert_array_equal(mine.counts, same.counts)
        np.testing.assert_array_equal(mine.target, same.target)
