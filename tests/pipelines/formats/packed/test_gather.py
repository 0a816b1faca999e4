"""The gather on the host, compiled and in NumPy, against NumPy's indexing."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipelines.formats.packed import gather_cpu
from pipelines.formats.packed.gather_cpu import COMPILED, gather_rows

RNG = np.random.default_rng(8)


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(gather_cpu, "_compiled", None)
    elif not COMPILED:
        assert shutil.which("cc") is None, "gather.c is not built, though there is a compiler: make setup"
        pytest.skip("there is no compiler")


def planes_of(numbers: npt.NDArray[np.int64], count: int) -> list[bytes]:
    return [(numbers >> 8 * plane & 255).astype(np.uint8).tobytes() for plane in range(count)]


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_each_voxel_gets_its_row(dtype: type[np.generic]) -> None:
    shapes = [(1, 1), (1, 256), (2, 300), (2, 65536), (3, 70000), (4, 70000)]
    # Offset 1: memory that is not aligned to the length of a row.
    for (planes, length), voxels, offset in itertools.product(shapes, (1, 7, 4096), (0, 1)):
        numbers = RNG.integers(0, length, voxels)
        table = RNG.integers(0, 32768, (length, 4)).astype(dtype)
        memory = np.full(4 * voxels + 8, -1, dtype)
        out = memory[offset:][: 4 * voxels].reshape(voxels, 4)
        assert gather_rows(planes_of(numbers, planes), table, out) is None
        np.testing.assert_array_equal(out, table[numbers])
        assert (memory[:offset] == -1).all() and (memory[offset + 4 * voxels :] == -1).all()
    for channels in (1, 3, 5):
        numbers, table = RNG.integers(0, 9, 100), RNG.integers(0, 99, (9, channels)).astype(dtype)
        out = np.empty((100, channels), dtype)
        assert gather_rows(planes_of(numbers, 1), table, out) is None
        np.testing.assert_array_equal(out, table[numbers])


def test_a_row_beyond_the_table_is_reported() -> None:
    for planes, length, row in ((1, 3, 3), (1, 3, 255), (2, 300, 65535), (4, 3, 2**32 - 1)):
        numbers = np.zeros(50, np.int64)
        numbers[[20, 30]] = row
        out = np.empty((50, 4), np.float32)
        assert gather_rows(planes_of(numbers, planes), RNG.random((length, 4), np.float32), out) == (20, row)


def test_the_compiled_gather_is_used_for_rows_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    if gather_cpu._compiled is None:
        return
    compiled, calls = gather_cpu._compiled, list[Any]()

    def seen(*given: Any) -> int:
        calls.append(given)
        return compiled(*given)

    monkeypatch.setattr(gather_cpu, "_compiled", seen)
    for dtype in (np.float32, np.int16):
        # Torch's memory is aligned.
        out = torch.empty(8, 4, dtype=torch.from_numpy(np.empty(0, dtype)).dtype).numpy()
        assert gather_rows([bytes(8)], np.zeros((3, 4), dtype), out) is None
    assert len(calls) == 1


def test_the_gather_is_thread_safe() -> None:
    table = RNG.random((60000, 4), np.float32)

    def check(seed: int) -> None:
        numbers = np.random.default_rng(seed).integers(0, 60000, 1 << 16)
        out = np.empty((1 << 16, 4), np.float32)
        assert gather_rows(planes_of(numbers, 2), table, out) is None
        np.testing.assert_array_equal(out, table[numbers])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, range(32)))


def test_arrays_that_do_not_match_are_refused() -> None:
    table, out = np.zeros((3, 4), np.float32), np.zeros((8, 4), np.float32)
    fixed = out.copy()
    fixed.flags.writeable = False
    planes = [bytes(8)]
    for wrong in (
        ([bytes(8), bytes(7)], table, out),
        (planes, table, np.zeros((8, 3), np.float32)),
        ([bytes(4)], table, out[::2]),
        (planes, table, out.astype(np.float64)),
        (planes, table, fixed),
        (planes, table[:, ::-1], out),
    ):
        with pytest.raises(ValueError):
            gather_rows(*wrong)
