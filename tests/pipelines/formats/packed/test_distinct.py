"""The table of a sample and its rows, compiled and in NumPy, against Python's Counter and NumPy's sort."""

from __future__ import annotations

import shutil
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.formats.packed import distinct
from pipelines.formats.packed.distinct import COMPILED, tabulate

RNG = np.random.default_rng(5)


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(distinct, "_compiled", None)
    elif not COMPILED:
        assert shutil.which("cc") is None, "distinct.c is not built, though there is a compiler: make setup"
        pytest.skip("there is no compiler")


def check(counts: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Check the result for `counts` by Python's Counter; return the table."""
    table, rows = tabulate(counts)
    voxels = [tuple(voxel) for voxel in counts.reshape(-1, counts.shape[-1]).tolist()]
    expected = sorted(Counter(voxels).items(), key=lambda item: (-item[1], item[0][::-1]))
    # Of the others, only the power of two of their frequency counts.
    expected[255:] = sorted(expected[255:], key=lambda item: (-(item[1] - 1).bit_length(), item[0][::-1]))
    assert table.dtype == np.int16 and [tuple(row) for row in table.tolist()] == [row for row, _ in expected]
    np.testing.assert_array_equal(table[rows], counts.reshape(-1, counts.shape[-1]))
    assert rows.shape == (len(voxels),) and rows.dtype == np.uint32
    return table


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("high", [1, 2, 4, 60, 32768])
def test_the_table_is_sorted_by_frequency_and_each_voxel_gets_its_row(channels: int, high: int) -> None:
    for size in (1, 2, 9, 16):
        check(RNG.integers(0, high, (size, size, size, channels)).astype(np.int16))
    tail = np.minimum(RNG.exponential(3, (16, 16, 16, channels)), 32767).astype(np.int16)
    assert len(check(tail)) < 16**3


def test_every_bit_of_a_voxel_tells_it_from_others() -> None:
    bits = 1 << np.arange(64, dtype=np.uint64)
    assert len(check(bits.view(np.int16).reshape(4, 4, 4, 4))) == 64


@pytest.mark.parametrize("rows", [1, 2048, 2049, 65536, 65537, 41**3])
def test_the_hash_table_grows(rows: int) -> None:
    numbers = RNG.permutation(np.arange(41**3) % rows)
    counts = np.zeros((41**3, 4), np.int16)
    counts[:, 1], counts[:, 3] = numbers & 0x7FFF, numbers >> 15
    assert len(check(counts.reshape(41, 41, 41, 4))) == rows


@pytest.mark.parametrize("shift", [0, 27, 42])
def test_a_sample_of_two_million_distinct_voxels_in_a_regular_pattern(shift: int) -> None:
    # Badly mixed keys would share a few slots, and this would run into the time limit.
    counts = (np.arange(1 << 21, dtype=np.uint64) << np.uint64(shift)).view(np.int16)
    table, rows = tabulate(counts.reshape(128, 128, 128, 4))
    voxels = counts.reshape(-1, 4)
    assert rows.dtype == np.uint32
    np.testing.assert_array_equal(table[rows], voxels)
    np.testing.assert_array_equal(table, voxels[np.lexsort(tuple(voxels.T))])


def test_counts_may_be_unaligned_read_only_and_not_contiguous() -> None:
    counts = RNG.integers(0, 9, (8, 8, 8, 4)).astype(np.int16)
    record = np.frombuffer(b"\n" + counts.tobytes(), np.int16, counts.size, 1).reshape(counts.shape)
    for given in (record, np.asfortranarray(counts), counts[::-1], counts[::2, ::2, ::2, :]):
        check(given)


def test_the_compiled_search_is_used_for_four_redshifts(monkeypatch: pytest.MonkeyPatch) -> None:
    if distinct._compiled is None:
        return
    compiled, seeds = distinct._compiled.find_distinct_1, list[int]()

    def seen(*given: Any) -> int:
        seeds.append(given[2])
        return compiled(*given)

    monkeypatch.setattr(distinct, "_compiled", SimpleNamespace(find_distinct_1=seen))
    for channels in (3, 4, 4):
        tabulate(np.zeros((2, 2, 2, channels), np.int16))
    # Another hash function each time.
    assert len(set(seeds)) == len(seeds) == 2 and all(seed % 2 for seed in seeds)
