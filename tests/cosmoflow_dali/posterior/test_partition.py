"""Division of the training samples between the network and the fit of its posteriors."""

from __future__ import annotations

import numpy as np
import pytest

from cosmoflow_dali.posterior.partition import LEAST_UNIVERSES, PosteriorConfig, hold_out
from pipelines.errors import ConfigError


def crops(universes: int, each: int) -> list[str]:
    """Return names of `each` crops of all `universes`, one universe after the other."""
    return [f"universe_{universe:05d}_{crop:03d}" for universe in range(universes) for crop in range(each)]


def universes_of(ids: list[str], index: np.ndarray) -> set[str]:
    return {ids[at].rpartition("_")[0] for at in index}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("each", [1, 3, 8])
def test_universes_are_divided_whole_and_no_sample_is_lost(seed: int, each: int) -> None:
    ids = crops(160, each)
    trained, held_out = hold_out(PosteriorConfig(calibration=0.4), ids, seed)
    assert universes_of(ids, trained).isdisjoint(universes_of(ids, held_out))
    np.testing.assert_array_equal(np.sort(np.concatenate([trained, held_out])), np.arange(len(ids)))
    assert (np.diff(trained) > 0).all() and (np.diff(held_out) > 0).all()
    assert len(held_out) == 0.4 * len(ids)


def test_universes_of_different_numbers_of_crops_are_divided_whole() -> None:
    ids = [name for at, name in enumerate(crops(150, 4)) if at % 4 <= at // 4 % 4]
    ids = [ids[at] for at in np.random.default_rng(0).permutation(len(ids))]
    trained, held_out = hold_out(PosteriorConfig(), ids, seed=1)
    assert len(trained) + len(held_out) == len(ids)
    assert universes_of(ids, trained).isdisjoint(universes_of(ids, held_out))
    assert len(universes_of(ids, held_out)) == 75


def test_division_follows_the_seed_and_the_names_alone() -> None:
    ids, config = crops(200, 1), PosteriorConfig()
    first, again, other = (hold_out(config, ids, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])
    # A draw, not a range: the first half of the files may differ from the second.
    assert 35 < np.isin(first[1], np.arange(100)).sum() < 65


@pytest.mark.parametrize(("each", "most"), [(1, 60), (3, 160), (3, 180)])
def test_large_sets_keep_no_more_samples_than_the_cap(each: int, most: int) -> None:
    ids = crops(400, each)
    trained, held_out = hold_out(PosteriorConfig(max_samples=most), ids, seed=0)
    # Whole universes: as many as fit, and the network has all others.
    assert len(held_out) == most // each * each
    assert len(trained) == len(ids) - len(held_out)


@pytest.mark.parametrize(
    ("universes", "each", "settings"),
    [
        (2 * LEAST_UNIVERSES - 2, 1, {}),
        # Many samples of few universes are few.
        (60, 40, {}),
        (1000, 1, {"calibration": 0.01}),
        (1000, 1, {"calibration": 0.99}),
    ],
)
def test_too_few_universes_on_either_side_are_refused(
    universes: int, each: int, settings: dict[str, float]
) -> None:
    config = PosteriorConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refusal:
        hold_out(config, crops(universes, each), seed=0)
    assert refusal.value.key == "posterior.calibration"
    assert "\n" not in str(refusal.value)


def test_cap_that_holds_too_few_universes_is_named() -> None:
    config = PosteriorConfig(max_samples=2 * LEAST_UNIVERSES - 1)
    with pytest.raises(ConfigError) as refusal:
        hold_out(config, crops(1000, 2), seed=0)
    assert (refusal.value.key, refusal.value.value) == ("posterior.max_samples", 2 * LEAST_UNIVERSES - 1)


def test_least_number_of_universes_is_enough() -> None:
    trained, held_out = hold_out(PosteriorConfig(), crops(2 * LEAST_UNIVERSES, 1), seed=0)
    assert len(trained) == len(held_out) == LEAST_UNIVERSES


@pytest.mark.parametrize(
    ("key", "value"),
    [("calibration", 0.0), ("calibration", 1.0), ("calibration", -0.5), ("calibration", float("nan")),
     ("max_samples", 0), ("max_samples", LEAST_UNIVERSES - 1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError) as refusal:
        PosteriorConfig(**{key: value})  # type: ignore[arg-type]
    assert refusal.value.key == key
