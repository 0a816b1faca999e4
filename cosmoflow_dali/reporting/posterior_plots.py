"""Pictures of a run's posteriors: calibration, widths beside errors, and what some universes tell.

Every band is three standard deviations of a perfect posterior.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cosmoflow_dali.reporting.plot_style import BLUE, INK, LIGHT_BLUE, SERIES, SYMBOLS
from pipelines.sample import HALF_RANGE, PARAMETERS, to_physical

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]

_SIGMAS = 3.0
_RANK_BINS = 20
_WIDTH_BINS, _LEAST_OF_BIN = 8, 10
"""Most bins of the predicted widths, and least samples of each."""

_CELLS = 60
"""Cells of the prior's range in a density of draws."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One posterior of n samples, and draws of it for some of them, in units of the target.

    Attributes:
        targets: True parameters, (n, 4).
        means: Means of the posteriors, (n, 4).
        deviations: Their standard deviations, (n, 4).
        below: Fraction of the draws below the truth, (n, 4).
        nearer: Fraction of the draws that are nearer to TARP's reference point than the truth, (n,).
        draws: Draws for the first few samples, (k, d, 4).
        universes: Number of independent universes among the samples, which sets the bands.
    """

    targets: Array
    means: Array
    deviations: Array
    below: Array
    nearer: Array
    draws: Array
    universes: int


def read_scored(path: Path, name: str, universes: int) -> Scored:
    """Return the posterior `name` of the archive `path`; see `reporting.posteriors`."""
    with np.load(path) as archive:
        own = {key: archive[f"{name}/{key}"] for key in ("means", "deviations", "below", "nearer")}
        return Scored(targets=archive["targets"], draws=archive["draws"], universes=universes, **own)


def draw_ranks(axes: list[Axes], scored: Scored) -> None:
    """Draw a histogram of the truth's rank among the draws for each parameter: even if calibrated."""
    edges = np.linspace(0, 1, _RANK_BINS + 1)
    error = _SIGMAS * np.sqrt((_RANK_BINS - 1) / scored.universes)
    for ax, parameter, color, ranks in zip(axes, PARAMETERS, SERIES, scored.below.T, strict=True):
        heights = np.histogram(ranks, edges)[0] * _RANK_BINS / len(ranks)
        ax.axhspan(1 - error, 1 + error, color=LIGHT_BLUE, alpha=0.35, lw=0)
        ax.axhline(1, color=INK, lw=0.8, ls="--")
        ax.stairs(heights, edges, color=color, lw=1.4)
        ax.set(xlim=(0, 1), ylim=(0, max(2.0, 1.1 * heights.max())), xlabel="rank of the truth")
        ax.set_title(SYMBOLS[parameter.name], fontsize=10)
    axes[0].set_ylabel("density")


def draw_calibration(axes: list[Axes], scored: Scored) -> None:
    """Draw the excess of coverage, of TARP's coverage, and errors against the predicted widths."""
    levels = np.linspace(0, 1, 201)
    symbols = [SYMBOLS[parameter.name] for parameter in PARAMETERS]
    # A rank is the middle of its step, so shares at a level compare without bias.
    central = np.abs(2 * scored.below - 1)
    _draw_excess(axes[0], levels, [*zip(central.T, SERIES, symbols, strict=True)], scored.universes)
    axes[0].set(xlabel="level of the central interval", ylabel="coverage less nominal")
    _draw_excess(axes[1], levels, [(scored.nearer, BLUE, "TARP")], scored.universes)
    axes[1].set(xlabel="level of TARP's region", ylabel="coverage less nominal")
    _draw_widths(axes[2], scored)


def _draw_excess(ax: Axes, levels: Array, curves: list[tuple[Array, str, str]], universes: int) -> None:
    """Draw the share of the values below each level, less the level; `curves` are values, colour, label."""
    error = _SIGMAS * np.sqrt(levels * (1 - levels) / universes)
    ax.fill_between(levels, -error, error, color=LIGHT_BLUE, alpha=0.35, lw=0)
    ax.axhline(0, color=INK, lw=0.8, ls="--")
    largest = error.max()
    for values, color, label in curves:
        excess = np.searchsorted(np.sort(values), levels, "right") / len(values) - levels
        ax.plot(levels, excess, color=color, lw=1.4, label=label)
        largest = max(largest, np.abs(excess).max())
    ax.set(xlim=(0, 1), ylim=(-1.35 * largest, 1.35 * largest))
    for at, words in ((0.95, "too wide"), (0.05, "too narrow")):
        ax.text(0.5, at, words, ha="center", va="center", size=8, color=INK, transform=ax.transAxes)
    if len(curves) > 1:
        ax.legend(fontsize=8, ncols=2, loc="upper right", handlelength=1, columnspacing=1)


def _draw_widths(ax: Axes, scored: Scored) -> None:
    """Draw the root mean square error of samples with similar posterior widths, against these widths."""
    bins = int(np.clip(len(scored.targets) // _LEAST_OF_BIN, 1, _WIDTH_BINS))
    squares, largest = np.square(scored.means - scored.targets), 0.0
    for at, (parameter, color) in enumerate(zip(PARAMETERS, SERIES, strict=True)):
        groups = np.array_split(np.argsort(scored.deviations[:, at], kind="stable"), bins)
        widths = [float(np.sqrt(np.square(scored.deviations[group, at]).mean())) for group in groups]
        errors = [float(np.sqrt(squares[group, at].mean())) for group in groups]
        # Of a root mean square of n Gaussian errors.
        spreads = [error / np.sqrt(2 * len(group)) for error, group in zip(errors, groups, strict=True)]
        label = SYMBOLS[parameter.name]
        ax.errorbar(widths, errors, spreads, fmt="o", ms=3.5, color=color, elinewidth=0.8, label=label)
        largest = max(largest, *widths, *(np.array(errors) + spreads))
    limits = (0, 1.05 * largest)
    ax.plot(limits, limits, color=INK, lw=0.8, ls="--")
    ax.set(xlim=limits, ylim=limits, xlabel="predicted standard deviation", ylabel="rms error")
    ax.legend(fontsize=8, ncols=2, loc="upper left", handlelength=1, columnspacing=1)


def draw_corner(axes: list[Axes], scored: Scored) -> None:
    """Draw densities of each parameter and pair of them, in physical units, over the range of the prior.

    Args:
        axes: 4 x 4 axes in rows.
        scored: Its draws are drawn.
    """
    last, true = len(PARAMETERS) - 1, to_physical(scored.targets)
    densities = [_Densities(draws) for draws in scored.draws]
    for row, ordinate in enumerate(PARAMETERS):
        for column, abscissa in enumerate(PARAMETERS):
            ax = axes[row * len(PARAMETERS) + column]
            if column > row:
                ax.set_axis_off()
                continue
            for density, truth, color in zip(densities, true, SERIES, strict=False):
                if column == row:
                    ax.plot(*density.of_parameter(row), color=color, lw=1.2)
                    ax.axvline(truth[row], color=color, lw=1, ls=":")
                    continue
                cells, levels = density.of_pair(column, row)
                x, y = _cell_centres(abscissa.mean), _cell_centres(ordinate.mean)
                ax.contour(x, y, cells, levels=levels, colors=color, linewidths=[0.7, 1.3][-len(levels) :])
                ax.plot(truth[column], truth[row], "x", color=color, ms=6, mew=1.6)
            ax.set(xlim=_prior_range(abscissa.mean))
            if column == row:
                ax.set(yticks=[])
                ax.set_ylim(bottom=0)
            else:
                ax.set(ylim=_prior_range(ordinate.mean))
            ax.locator_params(axis="x", nbins=3)
            ax.tick_params(labelbottom=row == last, labelleft=column == 0 and row > 0, labelsize=8)
            if row == last:
                ax.set_xlabel(_label(column))
            if column == 0 and row:
                ax.set_ylabel(_label(row))


class _Densities:
    """Densities of draws (d, 4) in cells over the range of the prior, smoothed by Silverman's rule."""

    def __init__(self, draws: Array) -> None:
        self._draws = draws
        widths = draws.std(axis=0) * len(draws) ** (-1 / 6) * _CELLS / 2
        self._kernels = [_smoothing(max(0.5, float(width))) for width in widths]

    def of_parameter(self, column: int) -> tuple[Array, Array]:
        """Return the cells' centres in physical units and the density of a parameter."""
        counts = np.histogram(self._draws[:, column], _CELLS, (-1, 1))[0]
        return _cell_centres(PARAMETERS[column].mean), self._kernels[column] @ counts

    def of_pair(self, column: int, row: int) -> tuple[Array, list[float]]:
        """Return the density of a pair of parameters (row, column), and its levels that hold 95% and 68%."""
        box = ((-1, 1), (-1, 1))
        counts = np.histogram2d(self._draws[:, row], self._draws[:, column], _CELLS, box)[0]
        density = self._kernels[row] @ counts @ self._kernels[column].T
        ordered = np.sort(density, axis=None)[::-1]
        held = ordered.cumsum() / ordered.sum()
        # Contours of a posterior within one cell may coincide.
        return density, sorted({float(ordered[np.searchsorted(held, share)]) for share in (0.95, 0.68)})


def _smoothing(width: float) -> Array:
    """Return the matrix (cells, cells) that smooths by a Gaussian of `width` cells.

    What leaves the range of the prior is reflected at its edge.
    """
    at = np.arange(_CELLS)
    images = np.stack([at, -1 - at, 2 * _CELLS - 1 - at])
    kernel: Array = np.exp(-0.5 * np.square((at[:, None, None] - images) / width)).sum(axis=1)
    return kernel / kernel.sum(axis=0)


def _cell_centres(mean: float) -> Array:
    """Return the centres of the cells in the units of the parameter with this `mean` over the prior."""
    return mean * (1 + HALF_RANGE * ((2 * np.arange(_CELLS) + 1) / _CELLS - 1))


def _prior_range(mean: float) -> tuple[float, float]:
    return mean * (1 - HALF_RANGE), mean * (1 + HALF_RANGE)


def _label(column: int) -> str:
    name, _, unit = PARAMETERS[column]
    return SYMBOLS[name] + (f" [{unit}]" if unit else "")
