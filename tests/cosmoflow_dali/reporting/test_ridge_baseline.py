"""Ridge baseline on samples whose true dependence is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import write_tiny

from cosmoflow_dali.reporting.ridge_baseline import compute_features, fit_ridge
from pipelines.dataset.open import open_folder
from pipelines.formats.registry import FORMATS
from pipelines.loading.reader import Reader
from pipelines.sample import Sample


def test_predicts_the_parameter_that_sets_the_variance_and_no_other(tmp_path: Path) -> None:
    # In the tiny set the second parameter sets the field's variance and the others do nothing.
    root = write_tiny(tmp_path / "data", train=150, validation=60, size=8)
    result = fit_ridge(*(Reader(open_folder(root / split)) for split in ("train", "validation")))
    assert result.samples == 60
    assert result.mae_per_parameter["sigma_8"] < 0.2
    for name in ("Omega_m", "n_s", "H_0"):
        trivial = result.trivial_mae_per_parameter[name]
        assert result.mae_per_parameter[name] == pytest.approx(trivial, rel=0.15)


def test_power_of_a_wave_is_in_its_shell() -> None:
    size = 16
    wave = 10 + np.round(5 * np.sin(2 * np.pi * 3 * np.arange(size) / size))
    counts = np.broadcast_to(wave[:, None, None, None], (size, size, size, 4)).astype(np.int16)
    spectrum = compute_features(counts)[: 4 * size // 2].reshape(4, size // 2)
    # The wave has three periods in the box: shell 3 holds its power, at every redshift.
    assert (spectrum.argmax(axis=1) == 2).all()


def test_features_are_invariant_to_shifts_and_symmetries() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (8, 8, 8, 4)).astype(np.int16)
    for other in (np.roll(counts, 3, axis=1), counts.transpose(1, 0, 2, 3), counts[::-1]):
        np.testing.assert_allclose(
            compute_features(np.ascontiguousarray(other)), compute_features(counts), rtol=1e-5
        )


def test_features_of_empty_and_dense_volumes_are_finite(tmp_path: Path) -> None:
    for value in (0, 32767):
        assert np.isfinite(compute_features(np.full((8, 8, 8, 4), value, np.int16))).all()
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        for index in range(3):
            sample = Sample(np.zeros((8, 8, 8, 4), np.int16), np.full(4, index / 4, np.float32))
            FORMATS["npy"].write(tmp_path / split, f"u{index}", sample)
    result = fit_ridge(*(Reader(open_folder(tmp_path / split)) for split in ("train", "validation")))
    assert np.isfinite(result.predictions).all()
