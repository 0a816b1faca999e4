"""Ridge baseline on samples whose true dependence is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import write_tiny

from cosmoflow_dali.posterior.fitted import number_universes
from cosmoflow_dali.reporting.ridge_baseline import fit_ridge
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


def test_volumes_without_particles_are_predicted(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        for index in range(3):
            sample = Sample(np.zeros((8, 8, 8, 4), np.int16), np.full(4, index / 4, np.float32))
            FORMATS["npy"].write(tmp_path / split, f"u{index}", sample)
    result = fit_ridge(*(Reader(open_folder(tmp_path / split)) for split in ("train", "validation")))
    assert np.isfinite(result.predictions).all()


def test_crops_share_their_universe() -> None:
    names = ["univ_a0000001_000", "univ_a0000001_001", "univ_a0000002_000", "other"]
    assert number_universes(names).tolist() == [1, 1, 2, 0]
    # Numbered samples without a universe.
    assert len(set(number_universes([f"sample_{index:03d}" for index in range(5)]))) == 5
