"""Linear theory compared with CAMB, textbook formulas and independent integrals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers import DATA
from scipy.integrate import quad
from scipy.special import hyp2f1

from pipelines.sample import REDSHIFTS
from preprocess.simulator.cosmology import (
    OMEGA_B,
    Cosmology,
    PowerSpectrum,
    draw_target,
    early_scales,
    growth,
    transfer,
)

MEAN = Cosmology(omega_m=0.3, sigma_8=0.8, n_s=0.96, H_0=70.0)
EDGES = [Cosmology(om, s8, ns, h0) for om, s8, ns, h0 in [(0.27, 0.72, 0.864, 63), (0.33, 0.88, 1.056, 77)]]
CAMB = json.loads((DATA / "camb.json").read_text())
"""Golden values of CAMB; the file states its settings."""


def test_spectrum_agrees_with_camb() -> None:
    errors = []
    for golden in CAMB["cosmologies"]:
        cosmology = Cosmology(golden["omega_m"], golden["sigma_8"], golden["n_s"], golden["H_0"])
        errors.append(PowerSpectrum(cosmology)(CAMB["k"]) / golden["power"] - 1.0)
    # This is the error of EH98's formulas, which rises with Omega_m h^2, from 1.2% rms to 2.6%.
    assert np.abs(errors).max() < 0.05
    assert np.sqrt(np.mean(np.square(errors))) < 0.02


def test_growth_agrees_with_camb() -> None:
    for golden in CAMB["cosmologies"]:
        found = [at.first for at in growth(golden["omega_m"], CAMB["redshifts"])]
        assert found == pytest.approx(golden["growth_without_radiation"], rel=1e-4)
        # The simulator neglects radiation.
        assert found == pytest.approx(golden["growth"], rel=1e-3)


@pytest.mark.parametrize("cosmology", [MEAN, *EDGES])
def test_spectrum_has_the_requested_sigma_8(cosmology: Cosmology) -> None:
    spectrum = PowerSpectrum(cosmology)

    def integrand(log_k: float) -> float:
        k = math.exp(log_k)
        x = 8.0 * k
        window = 3.0 * (math.sin(x) - x * math.cos(x)) / x**3
        return k**3 * float(spectrum(k)) * window**2 / (2.0 * math.pi**2)

    variance = sum(quad(integrand, low, low + 1.0, limit=200)[0] for low in np.arange(-9.0, 4.0))
    assert math.sqrt(variance) == pytest.approx(cosmology.sigma_8, rel=1e-3)


def test_spectrum_is_primordial_on_the_largest_scales() -> None:
    k = np.array([1e-5, 2e-5])
    np.testing.assert_allclose(transfer(MEAN, k), 1.0, rtol=1e-3)
    low, high = PowerSpectrum(MEAN)(k)
    assert math.log2(high / low) == pytest.approx(0.96, abs=2e-3)


def test_transfer_falls_as_log_k_over_k_squared() -> None:
    # Growth in the radiation era leaves T ~ ln k / k^2.
    k = np.array([20.0, 200.0])
    low, high = transfer(MEAN, k)
    slope = math.log(high / low) / math.log(10.0)
    assert -2.0 < slope < -1.75


@pytest.mark.parametrize("cosmology", [MEAN, *EDGES])
def test_sound_horizon_follows_the_fitting_formula(cosmology: Cosmology) -> None:
    # EH98 equation 26, accurate to 2% by its authors.
    om, ob = cosmology.omega_m * cosmology.h**2, OMEGA_B * cosmology.h**2
    fit = 44.5 * math.log(9.83 / om) / math.sqrt(1.0 + 10.0 * ob**0.75)
    assert early_scales(cosmology).sound_horizon == pytest.approx(fit, rel=0.02)


def test_acoustic_oscillations_have_the_sound_horizon_as_period() -> None:
    k = np.linspace(0.05, 0.35, 600)  # h/Mpc
    power = np.log(PowerSpectrum(MEAN)(k))
    smooth = np.polynomial.Polynomial.fit(np.log(k), power, 5)(np.log(k))
    lengths = np.linspace(60.0, 260.0, 401)  # Mpc
    waves = np.exp(1j * np.outer(lengths, k * MEAN.h))
    strength = np.abs(waves @ ((power - smooth) * np.hanning(len(k))))
    horizon = early_scales(MEAN).sound_horizon
    assert lengths[strength.argmax()] == pytest.approx(horizon, rel=0.1)


@pytest.mark.parametrize("omega_m", [0.27, 0.3, 0.33])
def test_linear_growth_is_the_hypergeometric_function(omega_m: float) -> None:
    redshifts = sorted(REDSHIFTS, reverse=True)

    def exact(z: float) -> float:
        a = 1.0 / (1.0 + z)
        return float(a * hyp2f1(1 / 3, 1, 11 / 6, -(1.0 - omega_m) / omega_m * a**3))

    for z, found in zip(redshifts, growth(omega_m, redshifts), strict=True):
        assert found.first == pytest.approx(exact(z) / exact(0.0), rel=2e-4)


def test_growth_without_lambda_is_the_scale_factor() -> None:
    for z, found in zip((9.0, 3.0, 0.0), growth(1.0, (9.0, 3.0, 0.0)), strict=True):
        assert found.first == pytest.approx(1.0 / (1.0 + z), rel=1e-4)
        assert found.second == pytest.approx(-3.0 / 7.0 * found.first**2, rel=2e-4)
        assert found.slope == pytest.approx(-6.0 / 7.0 * found.first, rel=1e-4)


def test_second_order_growth_follows_the_known_approximation() -> None:
    # Bouchet et al. 1995: E = -3/7 D^2 Omega_m(z)^(-1/143).
    for z, found in zip((3.0, 1.5, 0.5, 0.0), growth(0.3, (3.0, 1.5, 0.5, 0.0)), strict=True):
        matter = 0.3 * (1 + z) ** 3 / (0.3 * (1 + z) ** 3 + 0.7)
        assert found.second == pytest.approx(-3.0 / 7.0 * found.first**2 * matter ** (-1 / 143), rel=5e-3)


def test_targets_fill_the_published_ranges() -> None:
    rng = np.random.default_rng(0)
    targets = np.stack([draw_target(rng) for _ in range(4000)])
    assert targets.dtype == np.float32 and np.abs(targets).max() <= 1.0
    # Uniform in [-1, 1]: mean 0, standard deviation 1 / sqrt(3), parameters uncorrelated.
    np.testing.assert_allclose(targets.mean(axis=0), 0.0, atol=0.04)
    np.testing.assert_allclose(targets.std(axis=0), 1 / math.sqrt(3), rtol=0.04)
    correlation = np.corrcoef(targets.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.06
    edge = Cosmology.from_target([-1, 1, 0, 0.5])
    assert (edge.omega_m, edge.sigma_8, edge.n_s, edge.H_0) == pytest.approx((0.27, 0.88, 0.96, 73.5))
