"""A particle-mesh N-body simulation: one Gaussian field, evolved through the published redshifts.

One particle for each mesh cell starts on a lattice and moves to the first redshift by second-order
Lagrangian perturbation theory (2LPT), then in drift-kick-drift steps of the BullFrog scheme
(Rampf, List & Hahn 2024, arXiv:2409.19049). Time is the linear growth factor D, and a kick is

    V <- alpha V + (1 - alpha) / D_half A,    A = -grad (inverse Laplacian of the overdensity),

with alpha such that a step follows 2LPT exactly where that theory holds, so that few steps are enough.
The mesh of the forces has the size of the lattice.

Lengths are in mesh cells, fields have shape (size, size, size), and all arithmetic is float32. Results are
the same on every run if PyTorch has one thread.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from preprocess.simulator.cosmology import Growth, PowerSpectrum

_BLOCK = 1 << 15
"""Particles that are processed at a time, so that their mesh points stay in the cache."""


_LATTICE_OFFSET = 0.25
"""Offset of the lattice from the centres of the voxels in which particles are counted; see `Mesh.count`."""


class Mesh:
    """A periodic mesh of size^3 cells, and the operations that need its wave numbers."""

    def __init__(self, size: int) -> None:
        self.size = size
        index = torch.fft.fftfreq(size, 1.0 / size, dtype=torch.float64)
        axes = [index, index, torch.arange(size // 2 + 1, dtype=torch.float64)]
        shapes = [(-1, 1, 1), (1, -1, 1), (1, 1, -1)]
        waves = [axis.reshape(shape) for axis, shape in zip(axes, shapes, strict=True)]
        self.square: torch.Tensor = sum(wave**2 for wave in waves).to(torch.int32)
        """|n|^2 of each mode, whose wave number is 2 pi |n| / size; (size, size, size // 2 + 1)."""
        # The derivative of the Nyquist mode is not a real field, so it is set to 0.
        self._waves = [
            (torch.where(wave.abs() == size // 2, 0.0, wave) * (2.0 * torch.pi / size)).float()
            for wave in waves
        ]
        square = self.square.clamp(min=1) * (2.0 * torch.pi / size) ** 2
        self._inverse_square = torch.where(self.square == 0, 0.0, 1.0 / square).float()
        # Cloud-in-cell convolves twice with a top hat, once on the way to the mesh and once back.
        window = torch.ones((), dtype=torch.float64)
        for wave in waves:
            window = window * torch.sinc(wave / size) ** 4
        self._force = (self._inverse_square / window).float()

    def potential(self, modes: torch.Tensor) -> torch.Tensor:
        """Return the argument of `component` for the curl-free field with minus the divergence of `modes`."""
        return (modes * self._inverse_square).mul_(1j)

    def component(self, potential: torch.Tensor, axis: int) -> torch.Tensor:
        """Return one component (size, size, size) of a curl-free field; see `potential`."""
        return torch.fft.irfftn(self._waves[axis] * potential, s=self._shape)

    def second_order(self, modes: torch.Tensor) -> torch.Tensor:
        """Return the modes of div psi2 of 2LPT, for the linear overdensity of `modes`.

        div psi2 = sum over i < j of (f_ii f_jj - f_ij^2), f_ij the second derivatives of the
        potential (Bouchet et al. 1995, A&A 296, 575).
        """
        potential = -modes * self._inverse_square

        def second(i: int, j: int) -> torch.Tensor:
            return torch.fft.irfftn(-self._waves[i] * self._waves[j] * potential, s=self._shape)

        diagonal = [second(axis, axis) for axis in range(3)]
        source = torch.zeros(self._shape)
        for i, j in itertools.combinations(range(3), 2):
            source += diagonal[i] * diagonal[j] - second(i, j) ** 2
        return torch.fft.rfftn(source)

    def accelerations(self, positions: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield A of the module's docstring at the particles, (3, block); positions (3, particles)."""
        density = torch.zeros(self.size**3)
        for block in positions.split(_BLOCK, dim=1):
            points, weights = self._corners(block)
            density.index_add_(0, points.flatten(), weights.flatten())
        potential = torch.fft.rfftn(density.reshape(self._shape)).mul_(self._force).mul_(1j)
        del density
        field = torch.empty(self.size**3, 3)
        for axis in range(3):
            field[:, axis] = self.component(potential, axis).flatten()
        del potential
        # The points are computed again: those of all particles take 64 bytes each.
        for block in positions.split(_BLOCK, dim=1):
            points, weights = self._corners(block)
            force = torch.nn.functional.embedding_bag(points, field, per_sample_weights=weights, mode="sum")
            yield force.T

    def count(self, positions: torch.Tensor) -> npt.NDArray[np.int16]:
        """Return the number of particles in each voxel, (size, size, size), for positions (3, particles).

        The lattice has an offset of a quarter voxel from the centres. A particle at a centre would have to
        move half a voxel before a count changes: at z = 3, where it has moved 0.4 of 4 Mpc/h, counts would
        show 8% too little of the largest scales. With the offset the effect of the voxels' edges on the mean
        count cancels to first order of their Fourier series.
        """
        cells = torch.empty(positions.shape[1], dtype=torch.int32)
        for block, out in zip(positions.split(_BLOCK, dim=1), cells.split(_BLOCK), strict=True):
            x, y, z = self._wrap((block + _LATTICE_OFFSET).round()).to(torch.int32)
            torch.add((x * self.size + y) * self.size, z, out=out)
        counts = torch.bincount(cells, minlength=self.size**3)
        assert int(counts.max()) <= np.iinfo(np.int16).max
        return counts.to(torch.int16).reshape(self._shape).numpy()

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.size, self.size, self.size)

    def _wrap(self, whole: torch.Tensor) -> torch.Tensor:
        """Map whole numbers, as floats, into 0 to size - 1; much faster than an integer modulo."""
        return whole - (whole / self.size).floor_().mul_(self.size)

    def _corners(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the eight mesh points around each particle and their weights, both (particles, 8)."""
        floor = positions.floor()
        upper = positions - floor
        weight = (1.0 - upper, upper)
        index = [self._wrap(floor + side).to(torch.int32) for side in (0, 1)]
        planes = [axes[0] * self.size**2 for axes in index]
        rows = [axes[1] * self.size for axes in index]
        points = torch.empty(positions.shape[1], 2, 2, 2, dtype=torch.int32)
        weights = torch.empty(positions.shape[1], 2, 2, 2)
        for i, j in itertools.product((0, 1), repeat=2):
            point, product = planes[i] + rows[j], weight[i][0] * weight[j][1]
            for k in (0, 1):
                torch.add(point, index[k][2], out=points[:, i, j, k])
                torch.mul(product, weight[k][2], out=weights[:, i, j, k])
        return points.flatten(1), weights.flatten(1)


@functools.lru_cache(maxsize=1)
def mesh(size: int) -> Mesh:
    """Return the mesh of this size; a process works on one size at a time, so one is cached."""
    return Mesh(size)


def linear_modes(spectrum: PowerSpectrum, size: int, box: float, rng: np.random.Generator) -> torch.Tensor:
    """Draw a realisation of today's linear overdensity in a box of `box` Mpc/h, as its Fourier modes.

    complex64 (size, size, size // 2 + 1), in the convention of torch.fft.rfftn; the mean is 0.
    """
    white = torch.from_numpy(rng.standard_normal((size, size, size), dtype=np.float32))
    squares = np.arange(1, 3 * (size // 2) ** 2 + 1)
    power = spectrum(2.0 * np.pi / box * np.sqrt(squares)) / (box / size) ** 3
    amplitude = torch.from_numpy(np.sqrt(np.concatenate([[0.0], power]))).float()
    return torch.fft.rfftn(white) * amplitude[mesh(size).square]


def kick_weight(start: Growth, end: Growth) -> float:
    """Return alpha, the factor of the velocity in a drift-kick-drift step.

    With x = q + D psi1 + E psi2 and V = psi1 + E' psi2 at the start, the acceleration at D_half is
    D_half psi1 + (E_half - D_half^2) psi2, where E_half = E + (dD / 2) E'. With alpha the velocity at the end
    is again psi1 + E' psi2.
    """
    length = end.first - start.first
    half = start.first + length / 2.0
    force = (start.second + length / 2.0 * start.slope) / half - half
    return (end.slope - force) / (start.slope - force)


def evolve(
    modes: torch.Tensor, times: Sequence[Growth], record: Sequence[bool]
) -> Iterator[npt.NDArray[np.int16]]:
    """Yield counts (size, size, size) at those of the `times` that `record` marks, in order.

    The first time is reached by 2LPT, each later one by one step. `modes` are freed on the way. The largest
    demand for memory is 70 bytes for each particle; docs/simulator.md lists them.
    """
    grid = mesh(modes.shape[0])
    now = times[0]
    lattice = torch.meshgrid(*[torch.arange(grid.size, dtype=torch.float32)] * 3, indexing="ij")
    first, second = grid.potential(modes), grid.potential(grid.second_order(modes))
    del modes
    positions, velocities = torch.empty(2, 3, grid.size**3)
    for axis, (x, v) in enumerate(zip(positions, velocities, strict=True)):
        v[:] = grid.component(first, axis).flatten()
        torch.add(lattice[axis].flatten(), now.first * v, out=x)
        minus_psi2 = grid.component(second, axis).flatten()
        x -= now.second * minus_psi2
        v -= now.slope * minus_psi2
    del first, second, minus_psi2
    if record[0]:
        yield grid.count(positions)
    for end, wanted in zip(times[1:], record[1:], strict=True):
        length = end.first - now.first
        half = now.first + length / 2.0
        alpha = kick_weight(now, end)
        _drift(positions, velocities, length / 2.0)
        for v, force in zip(velocities.split(_BLOCK, dim=1), grid.accelerations(positions), strict=True):
            v *= alpha
            v += (1.0 - alpha) / half * force
        _drift(positions, velocities, length / 2.0)
        now = end
        if wanted:
            yield grid.count(positions)


def _drift(positions: torch.Tensor, velocities: torch.Tensor, length: float) -> None:
    """Move the particles, one axis at a time."""
    for x, v in zip(positions, velocities, strict=True):
        x += length * v


def step_redshifts(redshifts: Sequence[float], steps: int) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    """Return the end of each of `steps` steps, and whether it is one of `redshifts` (in falling order).

    The first step goes directly to the first redshift: before shell crossing 2LPT is more accurate than a
    mesh no finer than the lattice, whose forces on a barely disturbed lattice are mostly noise. The others
    divide the intervals between redshifts so that the longest step, in scale factor, is as short as possible.
    """
    ends = [1.0 / (1.0 + z) for z in redshifts]
    parts = [1] * (len(ends) - 1)
    for _ in range(steps - len(ends)):
        lengths = [(end - start) / n for start, end, n in zip(ends, ends[1:], parts, strict=False)]
        parts[lengths.index(max(lengths))] += 1
    stops, recorded = [redshifts[0]], [True]
    for i, n in enumerate(parts):
        for part in range(1, n + 1):
            inside = n / (ends[i] * (n - part) + ends[i + 1] * part) - 1.0
            stops.append(redshifts[i + 1] if part == n else inside)
            recorded.append(part == n)
    return tuple(stops), tuple(recorded)
