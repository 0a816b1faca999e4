"""Colours and matplotlib settings that all pictures share."""

from __future__ import annotations

from typing import Any

INK, BLUE, LIGHT_BLUE, ORANGE = "#1f2430", "#2f6db5", "#a9c3e2", "#c25a2a"

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
"""For `matplotlib.rc_context`."""
