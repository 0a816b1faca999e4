"""Loading of C files that may not be compiled, or be older than their callers."""

from __future__ import annotations

import ctypes

import pytest

from pipelines.formats.packed.compiled import load
from pipelines.formats.packed.gather_cpu import COMPILED


def test_a_library_that_is_missing_or_lacks_a_function_is_not_used() -> None:
    assert load("_missing") is None
    if not COMPILED:
        pytest.skip("there is no compiler")
    assert load("_gather", join_planes_1=(None, ())) is not None
    assert load("_gather", join_planes_1=(None, ()), join_planes_0=(ctypes.c_int, ())) is None
