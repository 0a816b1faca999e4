"""Colours and matplotlib settings that all pictures share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

INK, BLUE, LIGHT_BLUE, ORANGE = "#1f2430", "#2f6db5", "#a9c3e2", "#c25a2a"

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@contextmanager
def plot_style(settings: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Draw in the body with matplotlib's defaults, the shared style and `settings`.

    The user's matplotlibrc and MPLBACKEND have no effect: they may ask for LaTeX or for a backend that this
    machine does not have.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # matplotlib cannot be imported if it names a missing backend. No picture is shown on a screen.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib import style

    with style.context(["default", _STYLE, dict(settings or {})]):
        yield
