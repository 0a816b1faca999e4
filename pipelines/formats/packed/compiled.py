"""Loading of the C files of this folder, which the installation compiles if there is a compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def load(name: str, **functions: tuple[Any, Sequence[Any]]) -> Any:
    """Load the compiled file `name`.

    Args:
        functions: ctypes of the result and of the arguments of each function.

    Returns:
        The library; None if it was not built, or for another kind of machine that shares this checkout, or
        from an older source, which lacks a function.
    """
    try:
        library: Any = np.ctypeslib.load_library(name, __file__)
        for function, (result, arguments) in functions.items():
            found = getattr(library, function)
            found.restype, found.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library
