"""Training from the node's cache, filled before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import config_file, program, write_tiny
from run_artifacts import metrics, same_weights

from cosmoflow_dali.config import DataConfig, read_yaml, resolve
from cosmoflow_dali.training.fill_cache import _read
from cosmoflow_dali.training.run_data import open_data
from pipelines.dataset.cached import cached
from pipelines.dataset.open import open_folder
from pipelines.distributed.world import World
from pipelines.errors import ConfigError
from pipelines.loading.reader import Reader
from pipelines.storage.cache import CacheConfig, CachedStorage
from preprocess.staging.config import StageConfig

TRAIN = "cosmoflow_dali.train"


def remove_shards(data: Path) -> None:
    for path in data.glob("*/*.tar"):
        path.unlink()


def test_both_splits_are_read_through_the_cache(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=2, validation=1)
    cache = {"dir": str(tmp_path / "cache"), "size": "10 MB"}
    config = resolve(read_yaml(config_file(tmp_path / "c.yaml", data)), {"data.cache": cache})
    for split in open_data(config, World())[:2]:
        assert isinstance(split.storage, CachedStorage)
        assert split.storage.config == CacheConfig(cache["dir"], cache["size"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_trains_from_the_cache_alone(ranks: int, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=3, format_name="packed")
    assert program("preprocess.verify", data, "--write").code == 0
    cache = tmp_path / "cache"
    settings = {"dir": str(data), "cache": {"dir": str(cache), "size": "10 MB", "fill": True}}
    config = config_file(tmp_path / "c.yaml", data, data=settings, epochs=1, parallel={"spatial": ranks})
    first = program(TRAIN, "--config", config, "--run-dir", tmp_path / "one", ranks=ranks)
    assert first.code == 0, first.err
    remove_shards(data)
    second = program(TRAIN, "--config", config, "--run-dir", tmp_path / "two", ranks=ranks)
    assert second.code == 0, second.err
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    assert same_weights(tmp_path / "two", tmp_path / "one")


def test_fills_what_fits(tmp_path: Path) -> None:
    data, cache = write_tiny(tmp_path / "data", train=8, validation=1), tmp_path / "cache"
    # Counts of 16^3 and a label take 9 blocks of 4 KiB and one, so that 5 samples fit.
    split = cached(open_folder(data / "train"), CacheConfig(str(cache), "205 KiB"))
    _read(Reader(split), range(8))
    assert 40 <= sum(path.stat().st_blocks // 8 for path in cache.glob("*/??/*")) <= 51


def test_staged_samples_need_no_cache() -> None:
    stage, cache = StageConfig("stage"), CacheConfig("cache", "1 GB")
    with pytest.raises(ConfigError) as caught:
        DataConfig(stage=stage, cache=cache)
    assert caught.value.key == "cache.dir"
