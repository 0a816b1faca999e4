"""The picture of a benchmark: throughput and CPU time of each candidate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from benchmarks import harness
from cosmoflow_dali.reporting.plot_style import BLUE, INK, plot_style


class Figures(Protocol):
    """The drawn figures of a candidate."""

    @property
    def samples_per_s(self) -> harness.Spread:
        """Samples per second of wall time."""

    @property
    def cpu_ms(self) -> harness.Spread:
        """CPU time per sample in ms."""


def draw(results: Mapping[str, Mapping[str, Figures]], path: Path) -> None:
    """Draw bars of samples per second and CPU time per sample, one row of axes per setting, to `path`.

    Prints where the picture is, or that matplotlib is missing.
    """
    try:
        with plot_style():
            _draw(results, path)
    except ImportError:
        print("not drawn: matplotlib is not installed")
    else:
        print("drawn to", path)


def _draw(results: Mapping[str, Mapping[str, Figures]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.5 + 3.2 * len(results)), layout="constrained", dpi=110)
    rows = figure.subplots(len(results), 2, squeeze=False)
    for (setting, candidates), axes in zip(results.items(), rows, strict=True):
        names = list(candidates)[::-1]
        for axis, quantity, label in zip(
            axes, ("samples_per_s", "cpu_ms"), ("samples/s", "CPU ms per sample"), strict=True
        ):
            spreads = [getattr(candidates[name], quantity) for name in names]
            medians = [spread.median for spread in spreads]
            errors = [[s.median - s.p10 for s in spreads], [s.p90 - s.median for s in spreads]]
            bars = axis.barh(names, medians, xerr=errors, color=BLUE, ecolor=INK)
            axis.bar_label(bars, fmt=lambda value: f" {value:.0f}" if value >= 100 else f" {value:.3g}")
            axis.set_xlabel(label)
            axis.margins(x=0.15)
        axes[0].set_title(setting, loc="left")
        axes[1].set_yticklabels([])
    figure.savefig(path)
