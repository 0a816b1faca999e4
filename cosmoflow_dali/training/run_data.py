"""The samples of a run: simulating and opening them, and checks against its settings and its checkpoint."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cosmoflow_dali.config import TrainConfig
from cosmoflow_dali.posterior.fitted import number_universes
from cosmoflow_dali.posterior.partition import hold_out
from cosmoflow_dali.training.run_dir import Run
from pipelines.dataset.cached import cached
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import has_split, list_folder, open_folder
from pipelines.distributed.world import World, available_cores
from pipelines.errors import ConfigError, DataError
from pipelines.filesystem import is_hidden, is_present
from pipelines.formats.registry import READ_IN_PART
from pipelines.plan import plan_epoch
from pipelines.sample import ALL_SPLITS, SPLITS
from pipelines.slab import Slab
from preprocess.simulate import SETTINGS, make_dataset


def simulate_missing(config: TrainConfig) -> bool:
    """Simulate missing samples if `config` asks for it; return False if there is nothing to simulate."""
    root, simulate = config.data.location, config.data.simulate
    # Samples behind a URL came from elsewhere.
    if simulate is None or not isinstance(root, Path):
        return False
    samples = root / "train"
    simulated = is_present(root / SETTINGS) or not is_present(samples)
    # Samples without simulation.json came from elsewhere: use them as they are.
    if not simulated and not all(map(is_hidden, list_folder(samples))):
        return False
    if config.parallel.spatial > 1 and simulate.format not in READ_IN_PART:
        advice = (
            f"no part of such a sample can be read alone (parallel.spatial = {config.parallel.spatial}); use "
            f"{' or '.join(READ_IN_PART)}, with an empty data.dir"
        )
        raise ConfigError("data.simulate.format", simulate.format, advice)
    make_dataset(simulate, root, workers=available_cores(), shown=True)
    return True


def open_data(
    config: TrainConfig, world: World
) -> tuple[SampleDataset, SampleDataset, SampleDataset | None, SampleDataset | None]:
    """Open the samples of a run of `config`, whose seed is set.

    Returns:
        Samples for training, validation, the fit of posteriors and their test. The last two are None without
        posteriors, and the last one if there is no test split.

    Raises:
        ConfigError: The samples do not fit the network, cannot be read in part where ranks share them, there
            are too few universes for posteriors, or instances would stage different ones.
        DataError: A split cannot be read.
    """
    root = config.data.location
    tested = config.posterior is not None and has_split(root, "test")
    train, validation, *tests = (
        cached(open_folder(root / split), config.data.cache) for split in (ALL_SPLITS if tested else SPLITS)
    )
    for split in (train, validation, *tests):
        if split.spec.size != config.model.size:
            advice = f"the samples in {split.root} are {split.spec.size} voxels wide"
            raise ConfigError("model.size", config.model.size, advice)
        # Posteriors read whole samples of the test split.
        if (ranks := config.parallel.spatial) > 1 and split not in tests:
            slab = Slab(0, ranks, periodic=False)
            split.check_slab(slab)
            # A ConfigError says that this version of packed samples is not read in part; damage is for later.
            with contextlib.suppress(DataError):
                split.payload(0, slab=slab)
    if config.posterior is None:
        return train, validation, None, None
    if config.data.stage is not None and world.other_local_ranks:
        advice = (
            "with `posterior`, instances train on different samples, and those of one node would "
            "remove each other's copies; leave one of the two settings out"
        )
        raise ConfigError("data.stage.dir", config.data.stage.dir, advice)
    assert config.seed is not None
    ids = [train.sample_id(index) for index in range(len(train))]
    trained, held_out = hold_out(config.posterior, ids, config.seed)
    return train.subset(trained), validation, train.subset(held_out), tests[0] if tests else None


def check_data(run: Run, world: World) -> None:
    """Raise UserError unless the data of `run` fit the network, the ranks and the checkpoint."""
    config, ranks = run.config, world.size
    found, expected, samples = config.samples_per_step(ranks), config.global_batch, len(run.train)
    if expected is not None and expected != found:
        batch, spatial = config.loader.batch_size, config.parallel.spatial
        shared = f", {spatial} to a sample," if spatial > 1 else ""
        advice = (
            f"{ranks} ranks{shared} with loader.batch_size {batch} make {found}, but the learning rates are "
            f"tuned for {expected}; change the ranks or --batch-size"
        )
        raise ConfigError("global_batch", expected, advice)
    if config.data.stage is not None:
        readers = ranks // len(config.data.stage.teams(world.nodes))
        if readers % config.parallel.spatial:
            advice = (
                f"does not divide the {readers} ranks that read the same staged samples; change data.stage"
            )
            raise ConfigError("parallel.spatial", config.parallel.spatial, advice)
    plan_epoch(samples, global_batch=found, seed=0, epoch=0, shuffle=False, ragged="drop")
    if run.checkpoint is not None and run.checkpoint.train_samples != samples:
        advice = f"has {samples} training samples, but the run started with {run.checkpoint.train_samples}"
        raise ConfigError("data.dir", config.data.dir, advice)
    recorded = run.checkpoint.fingerprints if run.checkpoint is not None else {}
    for name, digests in recorded.items():
        # A sample may have been damaged then, or be damaged now.
        if any(old and new and old != new for old, new in zip(digests, run.fingerprints[name], strict=False)):
            advice = (
                f"its {name} samples have other names, another order or other contents than when the run "
                "started; restore them, or start a new run"
            )
            raise ConfigError("data.dir", config.data.dir, advice)


def check_partition(run: Run) -> None:
    """Raise ConfigError unless the nodes have the partition of the data that the checkpoint has."""
    partition = run.train.partition_signature
    if run.checkpoint is not None and run.checkpoint.division != partition:
        advice = (
            f"the run was trained on {run.checkpoint.division}, which determines its order; stage as then"
        )
        raise ConfigError("data.stage", partition, advice)


def check_symmetries(run: Run) -> None:
    """Raise ConfigError if `symmetries` are those of whole boxes and samples are crops, by their names."""
    if run.config.symmetries != "periodic":
        return
    for split in (run.train, run.validation):
        ids = [split.sample_id(index) for index in range(len(split))]
        universes = len(set(number_universes(ids).tolist()))
        if universes < len(split):
            advice = (
                f"crops are not periodic, and by their names the {len(split)} samples in {split.root} are "
                f"crops of {universes} universes; use false"
            )
            raise ConfigError("symmetries", run.config.symmetries, advice)
