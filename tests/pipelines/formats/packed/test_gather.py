"""The gather on the host, compiled and in NumPy, against NumPy's indexing."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import ROOT

from pipelines.formats.packed import gather_cpu
from pipelines.formats.packed.gather_cpu import COMPILED, ESCAPE, gather_rows, join_planes

RNG = np.random.default_rng(8)

SOURCE = ROOT / "pipelines" / "formats" / "packed" / "gather.c"

REPLACED = {
    "without AVX-512": ('__builtin_cpu_supports("avx512f")', "0"),
    "for another processor": ("__x86_64__", "NOT_DEFINED"),
}
"""Replacements in gather.c, each for a build that the tests use besides the installed one."""


@pytest.fixture(scope="module", params=["compiled", *REPLACED, "numpy"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return gather.c as a library, or None for NumPy."""
    if request.param == "numpy":
        return None
    if not COMPILED:
        assert shutil.which("cc") is None, "gather.c is not built, though there is a compiler: make setup"
        pytest.skip("there is no compiler")
    installed: Any = gather_cpu._compiled
    if request.param == "compiled":
        return installed
    if shutil.which("cc") is None:
        pytest.skip("there is no compiler")
    source, replaced = SOURCE.read_text(), REPLACED[request.param]
    assert replaced[0] in source
    path = tmp_path_factory.mktemp("gather") / "gather.so"
    command = ["cc", "-O3", "-std=c11", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=source.replace(*replaced), text=True, check=True)
    library: Any = ctypes.CDLL(str(path))
    for name in ("gather_rows_2", "join_planes_1"):
        like, function = getattr(installed, name), getattr(library, name)
        function.argtypes, function.restype = like.argtypes, like.restype
    return library


@pytest.fixture(autouse=True)
def backend(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_cpu, "_compiled", library)


def split(rows: npt.NDArray[np.int64]) -> tuple[bytes, npt.NDArray[np.uint32]]:
    """Return the symbols and the escapes of `rows`."""
    return np.minimum(rows, ESCAPE).astype(np.uint8).tobytes(), (rows[rows >= ESCAPE] - ESCAPE).astype(
        np.uint32
    )


def memory_of(voxels: int, dtype: Any) -> npt.NDArray[Any]:
    """Return aligned memory for so many voxels and eight more numbers, all -1."""
    dtype_of_torch = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.full((4 * voxels + 8,), -1, dtype=dtype_of_torch).numpy()


def table_of(length: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
    return RNG.integers(0, 32768, (length, 4)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_each_voxel_gets_its_row(dtype: type[np.generic]) -> None:
    lengths = (1, 3, 255, 256, 257, 300, 65536, 70000)
    # Offset 1: memory that is not aligned to the length of a row.
    for length, voxels, offset in itertools.product(lengths, (1, 7, 4096), (0, 1)):
        frequent, rare = RNG.integers(0, min(length, 256), voxels), RNG.integers(0, length, voxels)
        rows = np.where(RNG.random(voxels) < 0.2, rare, frequent)
        table, memory = table_of(length, dtype), memory_of(voxels, dtype)
        out = memory[offset:][: 4 * voxels].reshape(voxels, 4)
        symbols, escapes = split(rows)
        assert gather_rows(symbols, escapes if length > 256 else None, table, out) is None
        np.testing.assert_array_equal(out, table[rows])
        assert (memory[:offset] == -1).all() and (memory[offset + 4 * voxels :] == -1).all()


@pytest.mark.parametrize("channels", [1, 3, 5, 8])
def test_any_number_of_channels(channels: int) -> None:
    for length in (9, 300):
        rows, table = RNG.integers(0, length, 100), RNG.integers(0, 99, (length, channels)).astype(np.int16)
        symbols, escapes = split(rows)
        out = np.empty((100, channels), np.int16)
        assert gather_rows(symbols, escapes if length > 256 else None, table, out) is None
        np.testing.assert_array_equal(out, table[rows])


def patterns(voxels: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield where the escapes of so many voxels are."""
    at = np.arange(voxels)
    yield at < 0
    yield at >= 0
    for count in {1, 15, 16, 17, voxels // 2, voxels - 1}:
        yield at < count
        yield at >= voxels - count
    for period in (2, 8, 16, 17):
        yield at % period == 0
        yield at % period == period - 1
    yield RNG.random(voxels) < 0.1


def test_escapes_at_any_place_in_any_length() -> None:
    for voxels in (*range(1, 50), 63, 64, 65, 255, 256, 257):
        for escaped in patterns(voxels):
            rows = np.where(escaped, RNG.integers(255, 400, voxels), RNG.integers(0, 255, voxels))
            symbols, escapes = split(rows)
            table, out = table_of(400), memory_of(voxels, np.float32)[: 4 * voxels].reshape(-1, 4)
            assert gather_rows(symbols, escapes, table, out) is None
            np.testing.assert_array_equal(out, table[rows])
            # One escape too few, and one too many.
            for wrong in ([escapes[:-1]] if len(escapes) else []) + [np.append(escapes, escapes[:1])]:
                if len(wrong) != len(escapes):
                    found = gather_rows(symbols, wrong.astype(np.uint32), table, out)
                    assert found == f"has {len(wrong)} escapes for {len(escapes)} symbols"


def test_a_row_beyond_the_table_is_reported() -> None:
    out = memory_of(50, np.float32)[:200].reshape(50, 4)
    for length, row in ((1, 1), (3, 3), (3, 255), (255, 255)):
        symbols = np.zeros(50, np.uint8)
        symbols[[20, 30]] = row
        found = gather_rows(symbols.tobytes(), None, table_of(length), out)
        assert found == f"has the row {row} of a table of {length}"
    for length, row in ((257, 257), (300, 300), (300, 65535), (300, 2**32 - 1), (300, 2**32 + 254)):
        for place in (0, 20, 49):
            rows = np.arange(50) % 20 + 237
            rows[place] = row
            assert (
                gather_rows(*split(rows), table_of(length), out)
                == f"has the row {row} of a table of {length}"
            )


def guarded(content: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy of `content` that ends where memory must not be accessed."""
    pages = -(-content.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    bytes_of_it = np.frombuffer(memory, np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    last = bytes_of_it.ctypes.data + pages * mmap.PAGESIZE
    assert protect(last, mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
    copied = bytes_of_it[pages * mmap.PAGESIZE - content.nbytes :][: content.nbytes]
    copied[:] = content.reshape(-1).view(np.uint8)
    return copied.view(content.dtype).reshape(content.shape)


def test_nothing_is_accessed_out_of_bounds(library: Any) -> None:
    if library is None:
        return
    table = guarded(RNG.random((400, 4), np.float32))
    for voxels in (1, 15, 16, 17, 31, 32, 33, 1024):
        for escaped in patterns(voxels):
            rows = np.where(escaped, RNG.integers(255, 400, voxels), RNG.integers(0, 255, voxels))
            symbols, escapes = split(rows)
            symbols_there = guarded(np.frombuffer(symbols, np.uint8))
            out = guarded(np.zeros((voxels, 4), np.float32))
            surplus = np.append(escapes, np.zeros(40, np.uint32))
            for numbers in (escapes, escapes[1:], surplus):
                # An address is needed also for no escapes.
                given = guarded(numbers) if len(numbers) else guarded(surplus)[:0]
                found = library.gather_rows_2(
                    ctypes.c_char_p(symbols_there.ctypes.data), voxels, given.ctypes.data, len(given),
                    table.ctypes.data, len(table), out.ctypes.data,
                )  # fmt: skip
                assert found == (len(given) == len(escapes))
                if found:
                    np.testing.assert_array_equal(out, table[rows])


def test_the_compiled_gather_is_used_for_rows_of_16_bytes(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library is None:
        return
    calls = list[Any]()

    class Seen:
        def gather_rows_2(self, *given: Any) -> int:
            calls.append(given)
            return int(library.gather_rows_2(*given))

    monkeypatch.setattr(gather_cpu, "_compiled", Seen())
    for dtype, offset in ((np.float32, 0), (np.float32, 1), (np.int16, 0)):
        out = memory_of(8, dtype)[offset:][:32].reshape(8, 4)
        assert gather_rows(bytes(8), None, table_of(3, dtype), out) is None
    assert len(calls) == 1


def test_the_gather_is_thread_safe() -> None:
    table = RNG.random((60000, 4), np.float32)

    def check(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, 60000, 1 << 16)
        out = np.empty((1 << 16, 4), np.float32)
        assert gather_rows(*split(rows), table, out) is None
        np.testing.assert_array_equal(out, table[rows])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, range(32)))


def test_arrays_that_do_not_match_are_refused() -> None:
    table, out = np.zeros((3, 4), np.float32), np.zeros((8, 4), np.float32)
    fixed = out.copy()
    fixed.flags.writeable = False
    for symbols, *wrong in (
        (bytes(7), table, out),
        (bytes(9), table, out),
        (bytes(8), table, np.zeros((8, 3), np.float32)),
        (bytes(4), table, out[::2]),
        (bytes(8), table, out.astype(np.float64)),
        (bytes(8), table, fixed),
        (bytes(8), table[:, ::-1], out),
    ):
        for escapes in (None, np.zeros(0, np.uint32)):
            with pytest.raises(ValueError):
                gather_rows(symbols, escapes, *wrong)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_planes_are_joined(planes: int) -> None:
    for count in (0, 1, 5, 64, 100_003):
        numbers = RNG.integers(0, 1 << 8 * planes, count).astype(np.uint32)
        split_planes = [
            (numbers >> np.uint32(8 * plane)).astype(np.uint8).tobytes() for plane in range(planes)
        ]
        found = join_planes(split_planes)
        assert found.dtype == np.uint32
        np.testing.assert_array_equal(found, numbers)
