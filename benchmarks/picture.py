"""The picture of a benchmark: how fast each contestant is, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from benchmarks import harness


class Figures(Protocol):
    """What is drawn of a contestant."""

    @property
    def samples_per_s(self) -> harness.Spread:
        """On the clock."""

    @property
    def cpu_ms(self) -> harness.Spread:
        """Processor time a sample."""


def draw(results: Mapping[str, Mapping[str, Figures]], path: Path) -> None:
    """Bars of samples a second and of CPU time a sample, a row of them for each setting, at `path`.

    Says where the picture is, or that there is none for want of matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        print("not drawn: this Python lacks matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(results), 2, figsize=(11, 0.5 + 3.2 * len(results)), squeeze=False, layout="constrained"
    )
    for (setting, candidates), axes in zip(results.items(), rows, strict=True):
        names = list(candidates)[::-1]
        for axis, quantity, label in zip(
            axes, ("samples_per_s", "cpu_ms"), ("samples/s", "CPU ms a sample"), strict=True
        ):
            spreads = [getattr(candidates[name], quantity) for name in names]
            medians = [spread.median for spread in spreads]
            errors = [[s.median - s.p10 for s in spreads], [s.p90 - s.median for s in spreads]]
            bars = axis.barh(names, medians, xerr=errors, color="#4878a8", ecolor="#808080")
            axis.bar_label(
                bars, fmt=lambda value: f" {value:.0f}" if value >= 100 else f" {value:.3g}", fontsize=8
            )
            axis.set_xlabel(label)
            axis.margins(x=0.15)
        axes[0].set_title(setting, loc="left", fontsize=10)
        axes[1].set_yticklabels([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print("drawn to", path)
