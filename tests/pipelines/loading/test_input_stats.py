"""Statistics of the input over a split."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import write_tiny

from pipelines.dataset.open import open_folder
from pipelines.loading.input_stats import input_statistics
from pipelines.loading.reader import Reader


@pytest.mark.parametrize("apply_log", [False, True])
def test_mean_and_deviation_of_each_redshift(apply_log: bool, tmp_path: Path) -> None:
    split = open_folder(write_tiny(tmp_path / "data", train=20, validation=1) / "train")
    mean, std = input_statistics(Reader(split, apply_log=apply_log), apply_log=apply_log)
    stack = np.stack([split.read(index).counts for index in range(20)]).astype(np.float64)
    stack = np.log1p(stack) if apply_log else stack / stack.mean(axis=(1, 2, 3, 4), keepdims=True)
    np.testing.assert_allclose(mean, stack.mean(axis=(0, 1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, stack.std(axis=(0, 1, 2, 3)), rtol=1e-4)


def test_constant_input_is_only_shifted(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "data", train=3, validation=1) / "train"
    for path in folder.glob("*_data.npy"):
        np.save(path, np.full((16, 16, 16, 4), 7, np.int16))
    mean, std = input_statistics(Reader(open_folder(folder)), apply_log=True)
    np.testing.assert_allclose(mean, np.log1p(7), rtol=1e-6)
    np.testing.assert_array_equal(std, 1)


def test_no_more_memory_is_taken_than_for_reading_a_large_sample(tmp_path: Path) -> None:
    split = open_folder(write_tiny(tmp_path / "data", train=1, validation=1, size=64) / "train")

    def peak(apply_log: bool | None) -> int:
        tracemalloc.start()
        if apply_log is None:
            split.read(0)
        else:
            input_statistics(Reader(split), apply_log=apply_log)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    read = peak(None)
    assert peak(True) < read + 0.5 * split.spec.bytes
    # The counts as float32, twice.
    assert peak(False) < read + 4.5 * split.spec.bytes
