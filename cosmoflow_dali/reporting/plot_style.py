"""Colours and matplotlib settings that all pictures share, and pictures for web pages."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, BLUE, LIGHT_BLUE, ORANGE = "#1f2430", "#2f6db5", "#a9c3e2", "#c25a2a"

SERIES = (BLUE, ORANGE, "#5b9a4f", "#8661a6")
"""Colours of things of one kind, such as the four parameters."""

SYMBOLS = {"Omega_m": r"$\Omega_m$", "sigma_8": r"$\sigma_8$", "n_s": "$n_s$", "H_0": "$H_0$"}
"""Symbol of each parameter, by name."""

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_SVG = {
    # Text remains searchable text, and the file small.
    "svg.fonttype": "none",
    # A fixed salt, so that the same run gives the same file.
    "svg.hashsalt": "cosmoflow-dali",
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


def svg_picture(columns: int, height: float, draw: Callable[[list[Axes]], None], rows: int = 1) -> str:
    """Return the SVG element of `rows` x `columns` axes, of `height` inches in all, that `draw` fills."""
    with plot_style(_SVG):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.0, height), dpi=150, layout="constrained")
        draw(list(figure.subplots(rows, columns, squeeze=False).flat))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
