"""Loading of C files that may not be compiled, or be older than their callers."""

from __future__ import annotations

import ctypes

import pytest

from pipelines.formats.packed import gather_cpu
from pipelines.formats.packed.compiled import load


def test_a_library_that_is_missing_or_lacks_a_function_is_not_used() -> None:
    assert load("_missing") is None
    if not gather_cpu.COMPILED:
        pytest.skip("there is no compiler")
    # A library is loaded once in a process, so the signature has to be that of its callers.
    function = gather_cpu._compiled.join_planes_1
    known = {"join_planes_1": (function.restype, function.argtypes)}
    assert load("_gather", **known) is not None
    assert load("_gather", **known, join_planes_0=(ctypes.c_int, ())) is None
