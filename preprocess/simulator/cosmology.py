"""Flat LambdaCDM in linear theory: the initial power spectrum of a universe, and its growth.

Lengths are in Mpc/h and wave numbers in h/Mpc unless a name or a comment says otherwise. EH98 is
Eisenstein & Hu 1998 (ApJ 496, 605, astro-ph/9709112), whose equation numbers the comments give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.sample import to_physical

Array = npt.NDArray[np.float64]

OMEGA_B = 0.045
"""Baryon density of the published set, in units of the critical density."""

T_CMB = 2.7255
"""Temperature of the microwave background in K (Fixsen 2009, ApJ 707, 916)."""

SIGMA_RADIUS = 8.0
"""Radius in Mpc/h of the spheres whose rms overdensity is sigma_8."""


@dataclass(frozen=True, slots=True)
class Cosmology:
    """Four parameters of a universe; H_0 in km/s/Mpc."""

    omega_m: float
    sigma_8: float
    n_s: float
    H_0: float

    @classmethod
    def from_target(cls, target: npt.ArrayLike) -> Cosmology:
        """Return the parameters of a sample's target, (4,) in [-1, 1] (see `pipelines.sample`)."""
        return cls(*(float(value) for value in to_physical(target)))

    @property
    def h(self) -> float:
        """H_0 in units of 100 km/s/Mpc."""
        return self.H_0 / 100.0


def draw_target(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Draw a target (4,), each component uniform in [-1, 1], as in the published set."""
    return rng.uniform(-1.0, 1.0, 4).astype(np.float32)


class Scales(NamedTuple):
    """Scales of the early universe in the transfer function, in Mpc (without h)."""

    k_equality: float  # 1/Mpc
    z_equality: float
    z_drag: float
    r_equality: float  # baryon to photon momentum density at equality
    r_drag: float  # and at the drag epoch
    sound_horizon: float  # Mpc
    k_silk: float  # 1/Mpc


def early_scales(cosmology: Cosmology) -> Scales:
    """Return the scales of EH98, equations 2 to 7."""
    om, ob = cosmology.omega_m * cosmology.h**2, OMEGA_B * cosmology.h**2
    theta = T_CMB / 2.7
    z_equality = 2.50e4 * om * theta**-4  # 2
    k_equality = 7.46e-2 * om * theta**-2  # 3
    b1 = 0.313 * om**-0.419 * (1.0 + 0.607 * om**0.674)
    b2 = 0.238 * om**0.223
    z_drag = 1291.0 * om**0.251 / (1.0 + 0.659 * om**0.828) * (1.0 + b1 * ob**b2)  # 4
    r_equality, r_drag = (31.5e3 * ob * theta**-4 / z for z in (z_equality, z_drag))  # 5
    ratio = (math.sqrt(1.0 + r_drag) + math.sqrt(r_drag + r_equality)) / (1.0 + math.sqrt(r_equality))
    sound_horizon = 2.0 / (3.0 * k_equality) * math.sqrt(6.0 / r_equality) * math.log(ratio)  # 6
    k_silk = 1.6 * ob**0.52 * om**0.73 * (1.0 + (10.4 * om) ** -0.95)  # 7
    return Scales(k_equality, z_equality, z_drag, r_equality, r_drag, sound_horizon, k_silk)


def transfer(cosmology: Cosmology, k: npt.ArrayLike) -> Array:
    """Return the matter transfer function with baryon oscillations, at wave numbers k > 0 in h/Mpc."""
    scales = early_scales(cosmology)
    om = cosmology.omega_m * cosmology.h**2
    baryons = OMEGA_B / cosmology.omega_m
    dark = 1.0 - baryons
    wave = np.asarray(k, dtype=np.float64) * cosmology.h  # 1/Mpc
    q = wave / (13.41 * scales.k_equality)  # 10
    ks = wave * scales.sound_horizon

    def pressureless(alpha: float, beta: float) -> Array:
        logarithm = np.log(math.e + 1.8 * beta * q)
        c = 14.2 / alpha + 386.0 / (1.0 + 69.9 * q**1.08)  # 20
        return np.asarray(logarithm / (logarithm + c * q**2))  # 19

    a1 = (46.9 * om) ** 0.670 * (1.0 + (32.1 * om) ** -0.532)
    a2 = (12.0 * om) ** 0.424 * (1.0 + (45.0 * om) ** -0.582)
    alpha_c = a1**-baryons * a2 ** -(baryons**3)  # 11
    b1 = 0.944 / (1.0 + (458.0 * om) ** -0.708)
    beta_c = 1.0 / (1.0 + b1 * (dark ** ((0.395 * om) ** -0.0266) - 1.0))  # 12
    f = 1.0 / (1.0 + (ks / 5.4) ** 4)  # 18
    cold = f * pressureless(1.0, beta_c) + (1.0 - f) * pressureless(alpha_c, beta_c)  # 17

    y = (1.0 + scales.z_equality) / (1.0 + scales.z_drag)
    root = math.sqrt(1.0 + y)
    g = y * (-6.0 * root + (2.0 + 3.0 * y) * math.log((root + 1.0) / (root - 1.0)))  # 15
    alpha_b = 2.07 * scales.k_equality * scales.sound_horizon * (1.0 + scales.r_drag) ** -0.75 * g  # 14
    beta_b = 0.5 + baryons + (3.0 - 2.0 * baryons) * math.hypot(17.2 * om, 1.0)  # 24
    beta_node = 8.41 * om**0.435  # 23
    phase = ks / (1.0 + (beta_node / ks) ** 3) ** (1.0 / 3.0)  # 22, times k
    envelope = pressureless(1.0, 1.0) / (1.0 + (ks / 5.2) ** 2)
    envelope += alpha_b / (1.0 + (beta_b / ks) ** 3) * np.exp(-((wave / scales.k_silk) ** 1.4))
    sound = envelope * np.sinc(phase / np.pi)  # 21; numpy's sinc(x) is sin(pi x) / (pi x)
    return np.asarray(baryons * sound + dark * cold)  # 16


def top_hat(x: npt.ArrayLike) -> Array:
    """Return the Fourier transform of a sphere of unit volume at x = k R > 0."""
    x = np.asarray(x, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        exact = 3.0 * (np.sin(x) - x * np.cos(x)) / x**3
    # A difference of two nearly equal numbers: below 0.01 the series is more accurate.
    return np.asarray(np.where(x < 1e-2, 1.0 - x**2 / 10.0, exact))


class PowerSpectrum:
    """Linear matter power spectrum today, A k^n_s T(k)^2, with the amplitude A set by sigma_8."""

    def __init__(self, cosmology: Cosmology) -> None:
        self._cosmology, self._amplitude = cosmology, 1.0
        # The integrand k^3 P W^2 has fallen by more than 1e-7 of its peak at both ends.
        log_k = np.linspace(math.log(1e-5), math.log(1e2), 4096)
        k = np.exp(log_k)
        integrand = k**3 * self(k) * top_hat(k * SIGMA_RADIUS) ** 2 / (2.0 * np.pi**2)
        variance = float(np.sum((integrand[1:] + integrand[:-1]) / 2.0)) * (log_k[1] - log_k[0])
        self._amplitude = cosmology.sigma_8**2 / variance

    def __call__(self, k: npt.ArrayLike) -> Array:
        """Return P(k) in (Mpc/h)^3 at wave numbers k > 0 in h/Mpc."""
        k = np.asarray(k, dtype=np.float64)
        return np.asarray(self._amplitude * k**self._cosmology.n_s * transfer(self._cosmology, k) ** 2)


class Growth(NamedTuple):
    """Growth of a displacement field at one redshift, in Lagrangian perturbation theory.

    A particle with initial position q is at q + first * psi1 + second * psi2.

    first: Linear growth factor D, 1 today.
    second: Growth factor of second order.
    slope: d second / d first.
    """

    first: float
    second: float
    slope: float


def growth(omega_m: float, redshifts: Sequence[float]) -> tuple[Growth, ...]:
    """Return the growth at redshifts in falling order, each between 99 and 0, in a flat universe.

    First order is the equation of linear growth, d2D/dN2 + (2 + dlnE/dN) dD/dN = 3/2 Omega_m(a) D
    with N = ln a; second order has -3/2 Omega_m(a) D^2 as a further source (Bouchet et al. 1995,
    A&A 296, 575). Radiation is neglected, as usual for simulations that start after equality: with it,
    D(3) / D(0) would be about 0.05% larger.
    """
    log_a = -math.log(1e2)
    a = math.exp(log_a)
    # Lambda is 2e-6 of the matter at that time, so D = a and second = -3/7 a^2.
    state = np.array([a, a, -3.0 / 7.0 * a**2, -6.0 / 7.0 * a**2])

    def derivative(log_a: float, state: Array) -> Array:
        lambda_to_matter = (1.0 - omega_m) / omega_m * math.exp(3.0 * log_a)
        matter = 1.0 / (1.0 + lambda_to_matter)
        d, d_slope, e, e_slope = state
        drag = 2.0 - 1.5 * matter
        source = 1.5 * matter
        return np.array(
            [d_slope, source * d - drag * d_slope, e_slope, source * (e - d * d) - drag * e_slope]
        )

    states = []
    for z in (*redshifts, 0.0):
        end = -math.log1p(z)
        count = max(1, math.ceil((end - log_a) / 0.2))
        step = (end - log_a) / count
        for _ in range(count if end > log_a else 0):  # Runge-Kutta of fourth order
            k1 = derivative(log_a, state)
            k2 = derivative(log_a + step / 2, state + step / 2 * k1)
            k3 = derivative(log_a + step / 2, state + step / 2 * k2)
            k4 = derivative(log_a + step, state + step * k3)
            state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            log_a += step
        log_a = end
        states.append(state)
    today = states.pop()[0]
    return tuple(
        Growth(float(d / today), float(e / today**2), float(e_slope / d_slope / today))
        for d, d_slope, e, e_slope in states
    )
