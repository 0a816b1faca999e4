r"""Summary statistics of a universe: power spectra, histogram, counts in cells, moments across redshifts.

N_i(x) is the count in voxel x at redshift i, and n the edge of the volume in voxels. The volume is taken as
periodic; in a crop this joins opposite faces, in every universe alike. All summaries are unchanged by
periodic shifts and by permutations of the axes.

- **Spectra** (Peebles 1980, "The Large-Scale Structure of the Universe", section 41). F_i(k) is the discrete
  Fourier transform of N_i. P_ij is the mean of Re F_i F_j^\* / n^3 over the modes in a shell of \|k\| one
  fundamental mode wide, from 1 to the Nyquist frequency. It includes the shot noise of the particles. The
  summaries are log P_ii, and artanh of P_ij / (P_ii P_jj)^(1/2) for i < j.
- **Histogram.** log((M + 1) / n^3), where M voxels have a count in a bin of `_BIN_EDGES`.
- **Counts in cells** (Peebles 1980, section 36), one-point statistics after smoothing. N_i is summed over
  cells of 2, 4 and 8 voxels at all n^3 positions. The sums of a redshift are sorted and cut at the
  probabilities `_CUTS`; the summary is log(1 + mean) of each piece.
- **Moments across redshifts** of y_i = log(1 + N_i), for voxels and for each cell. The logarithm makes
  moments of the skewed counts informative (Neyrinck, Szapudi and Szalay 2009, ApJ 698, L90). The summaries
  are the mean, the log of the standard deviation, and the joint moments of orders 2 to 4 of the standardized
  y_i, such as <y_0^2 y_1 y_3>.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, combinations_with_replacement, pairwise

import numpy as np
import numpy.typing as npt
import torch

from pipelines.sample import SampleSpec

Array = npt.NDArray[np.float64]

_BIN_EDGES = (0, 1, 2, 3, 4, 6, 9, 13, 20, 32, 64)
"""Lower edges of the histogram's bins; the last bin has no upper edge."""

_CELLS = (2, 4, 8)
"""Edges of cells in voxels, each twice the one before; used up to a quarter of the volume's edge."""

_CUTS = (0.0, 0.01, 0.04, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96, 0.985, 0.995, 1.0)
"""Probabilities at which sorted counts in cells are cut."""

_FLOOR = 1e-9
"""Least power and variance, so that a uniform field has finite logarithms."""

_MAX_CORRELATION = 1 - 1e-6
"""Largest correlation between redshifts, so that its artanh is finite."""


def compute_summaries(counts: npt.NDArray[np.int16]) -> Array:
    """Return the summaries of `counts` (B, n, n, n, C), (B, f): 636 numbers at n = 32 and C = 4.

    The first `num_basic_summaries` are the spectra of single redshifts and the histograms.
    """
    # One universe at a time stays in the processor's cache.
    return np.concatenate([_compute(fields) for fields in _fields(counts).split(1)])


def num_basic_summaries(spec: SampleSpec) -> int:
    """Return the number of spectra of single redshifts and histograms of a sample of `spec`."""
    return spec.channels * (spec.size // 2 + len(_BIN_EDGES))


def power_spectra(fields: torch.Tensor) -> torch.Tensor:
    """Return P_ij of `fields` (B, C, n, n, n) in each shell, (B, C, C, n // 2)."""
    order, ends, weights = _shells(fields.shape[-1])
    modes = torch.fft.rfftn(fields, dim=(2, 3, 4)).flatten(2)[..., order]
    # Real and imaginary parts side by side: Re F_i F_j* is then a product of real matrices.
    parts = torch.view_as_real(modes) * weights
    shells = [parts[..., start:end, :].flatten(2) for start, end in pairwise(ends)]
    return torch.stack([shell @ shell.mT for shell in shells], dim=-1)


def log_spectra(power: torch.Tensor) -> torch.Tensor:
    """Return log P_ii of `power` (B, C, C, shells), (B, C, shells)."""
    return power.diagonal(dim1=1, dim2=2).mT.clamp(min=_FLOOR).log()


def cross_correlations(power: torch.Tensor) -> torch.Tensor:
    """Return artanh of the correlations between redshifts, (B, C (C - 1) / 2, shells)."""
    first, second = torch.triu_indices(power.shape[1], power.shape[1], 1)
    own = power.diagonal(dim1=1, dim2=2).mT.clamp(min=_FLOOR)
    correlation = power[:, first, second] / (own[:, first] * own[:, second]).sqrt()
    return correlation.clamp(-_MAX_CORRELATION, _MAX_CORRELATION).atanh()


def log_histograms(fields: torch.Tensor) -> torch.Tensor:
    """Return the log fraction of voxels of `fields` (B, C, n, n, n) in each bin, (B, C, bins)."""
    rows = fields.flatten(2).flatten(0, 1)
    last = _BIN_EDGES[-1]
    # Every count has a bin of its own at first; those from the last edge on share one.
    single = rows.clamp(max=last).long() + (last + 1) * torch.arange(len(rows))[:, None]
    voxels = torch.bincount(single.flatten(), minlength=len(rows) * (last + 1)).reshape(len(rows), -1)
    bins = [voxels[:, low:high].sum(dim=1) for low, high in pairwise((*_BIN_EDGES, last + 1))]
    # One more voxel in each bin: an empty one has a finite logarithm.
    return ((torch.stack(bins, dim=1) + 1.0) / rows.shape[1]).log().reshape(*fields.shape[:2], -1)


def double_cells(cells: torch.Tensor, edge: int) -> torch.Tensor:
    """Return counts at all positions in cells of 2 * `edge` voxels, from those of `edge`, (B, C, n, n, n)."""
    for axis in (2, 3, 4):
        cells = cells + cells.roll(-edge, axis)
    return cells


def log_sorted_means(cells: torch.Tensor) -> torch.Tensor:
    """Return log(1 + mean) of each piece of the sorted counts `cells` (B, C, n, n, n), (B, C, pieces)."""
    # Counts in cells are integers, which NumPy sorts ten times as fast as torch.
    ordered = np.sort(cells.flatten(2).numpy().astype(np.int32), axis=-1)
    cuts = np.round(np.multiply(_CUTS, ordered.shape[-1])).astype(np.int64)
    lengths = np.diff(cuts)
    # A volume of few voxels has no outermost pieces.
    sums = np.add.reduceat(ordered, cuts[:-1][lengths > 0], axis=-1, dtype=np.float64)
    return torch.from_numpy(np.log1p(sums / lengths[lengths > 0]))


def joint_moments(cells: torch.Tensor) -> torch.Tensor:
    """Return mean, log standard deviation and joint moments of log(1 + `cells`), (B, moments)."""
    channels = cells.shape[1]
    y = cells.flatten(2).log1p()
    mean = y.mean(dim=-1, keepdim=True)
    y = y - mean
    deviation = y.square().mean(dim=-1, keepdim=True).clamp(min=_FLOOR).sqrt()
    y = y / deviation
    # The products of all y_i and y_i y_j with one another hold every moment up to the fourth.
    first, second = torch.triu_indices(channels, channels)
    factors = torch.cat([y, y[:, first] * y[:, second]], dim=1)
    products = factors @ factors.mT / y.shape[-1]
    rows, columns = _moment_positions(channels)
    return torch.cat([mean[..., 0], deviation[..., 0].log(), products[:, rows, columns]], dim=1)


def _compute(fields: torch.Tensor) -> Array:
    power = power_spectra(fields)
    parts = [log_spectra(power), log_histograms(fields), cross_correlations(power), joint_moments(fields)]
    cells = fields
    for edge in _CELLS:
        if 4 * edge <= fields.shape[-1]:
            cells = double_cells(cells, edge // 2)
            parts += [log_sorted_means(cells), joint_moments(cells)]
    return _join(parts)


def _fields(counts: npt.NDArray[np.int16]) -> torch.Tensor:
    """Return `counts` (B, n, n, n, C) as float32 (B, C, n, n, n); sums over cells of 8 voxels are exact."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(counts, -1, 1), dtype=np.float32))


def _join(parts: list[torch.Tensor]) -> Array:
    return torch.cat([part.flatten(1).double() for part in parts], dim=1).numpy()


@lru_cache(maxsize=1)
def _shells(size: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Return the order of the modes of an rfftn by shell, the ends of the shells in it, and weights.

    The sum of the squares of weight * mode is the mean power of the shell.

    Returns:
        Order (m,); ends of `size` // 2 shells; weights (m, 1).
    """
    full, half = torch.fft.fftfreq(size, 1 / size), torch.arange(size // 2 + 1, dtype=torch.float32)
    radius = torch.sqrt(full.reshape(-1, 1, 1) ** 2 + full.reshape(1, -1, 1) ** 2 + half**2)
    shells = radius.round().long().flatten()
    # An rfftn holds one of each pair k and -k, except where the last component is 0 or Nyquist.
    pairs = torch.where((half > 0) & (half < size / 2), 2.0, 1.0).expand_as(radius).flatten()
    weights = (pairs / torch.bincount(shells, weights=pairs)[shells] / size**3).sqrt().float()
    order = shells.argsort(stable=True)
    ends = torch.searchsorted(shells[order], torch.arange(1, size // 2 + 2)).tolist()
    return order, ends, weights[order, None]


@lru_cache(maxsize=1)
def _moment_positions(channels: int) -> tuple[list[int], list[int]]:
    """Return rows and columns of the moments of orders 2 to 4 among the products in `joint_moments`."""
    single = range(channels)
    pair = {chosen: channels + at for at, chosen in enumerate(combinations_with_replacement(single, 2))}
    second = list(combinations(single, 2))
    third = [(pair[i, j], k) for i, j, k in combinations_with_replacement(single, 3)]
    fourth = [(pair[i, j], pair[k, m]) for i, j, k, m in combinations_with_replacement(single, 4)]
    rows, columns = zip(*second, *third, *fourth, strict=True)
    return list(rows), list(columns)
