"""Voxels' values by the row of a table, compiled and by numpy, against numpy's plain indexing."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipelines.formats.packed import gather_cpu as rows
from pipelines.formats.packed.gather_cpu import COMPILED, gather_rows

RNG = np.random.default_rng(8)


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(rows, "_compiled", None)
    elif not COMPILED:
        assert shutil.which("cc") is None, "gather.c is not built, though there is a compiler: make setup"
        pytest.skip("there is no compiler")


def planes_of(numbers: npt.NDArray[np.int64], count: int) -> list[bytes]:
    return [(numbers >> 8 * plane & 255).astype(np.uint8).tobytes() for plane in range(count)]


@pytest.mark.parametrize(
    ("planes", "length"), [(1, 1), (1, 256), (2, 300), (2, 65536), (3, 70000), (4, 70000)]
)
@pytest.mark.parametrize("voxels", [1, 7, 4096])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("offset", [0, 1])
def test_each_voxel_has_its_row(
    planes: int, length: int, voxels: int, dtype: type[np.generic], offset: int
) -> None:
    numbers = RNG.integers(0, length, voxels)
    table = RNG.integers(0, 32768, (length, 4)).astype(dtype)
    room = np.full(4 * voxels + 8, -1, dtype)
    # Also where memory is not aligned to what a row is long.
    out = room[offset:][: 4 * voxels].reshape(voxels, 4)
    assert gather_rows(planes_of(numbers, planes), table, out) is None
    np.testing.assert_array_equal(out, table[numbers])
    assert (room[:offset] == -1).all() and (room[offset + 4 * voxels :] == -1).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(channels: int) -> None:
    numbers, table = RNG.integers(0, 9, 100), RNG.random((9, channels), np.float32)
    out = np.empty((100, channels), np.float32)
    assert gather_rows(planes_of(numbers, 1), table, out) is None
    np.testing.assert_array_equal(out, table[numbers])


@pytest.mark.parametrize(
    ("planes", "length", "row"), [(1, 3, 3), (1, 3, 255), (2, 300, 65535), (4, 3, 2**32 - 1)]
)
def test_a_row_that_is_not_in_the_table_is_told(planes: int, length: int, row: int) -> None:
    numbers = np.zeros(50, np.int64)
    numbers[[20, 30]] = row
    out = np.empty((50, 4), np.float32)
    assert gather_rows(planes_of(numbers, planes), RNG.random((length, 4), np.float32), out) == (20, row)


def test_what_is_compiled_is_called_where_rows_are_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    if rows._compiled is None:
        return
    compiled, calls = rows._compiled, list[Any]()

    def seen(*given: Any) -> int:
        calls.append(given)
        return compiled(*given)

    monkeypatch.setattr(rows, "_compiled", seen)
    for dtype in (np.float32, np.int16):
        # Torch's memory is aligned.
        out = torch.empty(8, 4, dtype=torch.from_numpy(np.empty(0, dtype)).dtype).numpy()
        assert gather_rows([bytes(8)], np.zeros((3, 4), dtype), out) is None
    assert len(calls) == 1


def test_threads_do_not_meet() -> None:
    table = RNG.random((60000, 4), np.float32)

    def check(seed: int) -> None:
        numbers = np.random.default_rng(seed).integers(0, 60000, 1 << 16)
        out = np.empty((1 << 16, 4), np.float32)
        assert gather_rows(planes_of(numbers, 2), table, out) is None
        np.testing.assert_array_equal(out, table[numbers])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, range(32)))


def test_what_does_not_go_together_is_refused() -> None:
    table, out = np.zeros((3, 4), np.float32), np.zeros((8, 4), np.float32)
    with pytest.raises(ValueError, match="8 voxels, and planes of"):
        gather_rows([bytes(8), bytes(7)], table, out)
    with pytest.raises(ValueError, match=r"rows of \(4,\), and the output of \(3,\)"):
        gather_rows([bytes(8)], table, np.zeros((8, 3), np.float32))
    fixed = out.copy()
    fixed.flags.writeable = False
    for wrong in (out[::2], out.astype(np.float64), fixed):
        with pytest.raises(ValueError, match="contiguous and of one dtype"):
            gather_rows([bytes(len(wrong))], table, wrong)
    with pytest.raises(ValueError, match="contiguous and of one dtype"):
        gather_rows([bytes(8)], table[:, ::-1], out)
