"""The loaders of a run: this rank's samples, or its slabs of those that it shares."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import torch

from cosmoflow_dali.training.run_dir import Run
from pipelines.distributed.sample_groups import maximum_over
from pipelines.distributed.session import Session
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.slab import Slab

logger = logging.getLogger(__name__)


@contextmanager
def open_loaders(
    run: Run, session: Session, device: torch.device, *, periodic: bool
) -> Iterator[tuple[Loader, Loader]]:
    """Yield the loaders of training and validation samples.

    Args:
        run: The run, on the samples of this node.
        session: The ranks; `parallel.spatial` divides their number.
        device: Device of the batches.
        periodic: Beyond the ends of a volume are the planes of its other end, instead of zeros.
    """
    config, world, spatial = run.config, session.world, run.config.parallel.spatial
    slab = agree = None
    if spatial > 1:
        slab = Slab(world.rank % spatial, spatial, periodic)
        size, at_once = config.model.size, config.samples_per_step(world.size)
        logger.info(
            "%d ranks share a sample, %d of its %d planes each; %d samples a step",
            spatial,
            size // spatial,
            size,
            at_once,
        )
        if config.loader.on_bad_sample == "skip":
            agree = maximum_over(session, spatial)
    # Ranks with the same samples divide them; ranks of other nodes may have other samples.
    readers = world.size // run.train.num_partitions
    rank_slice = RankSlice(world.rank % readers // spatial, readers // spatial)
    load = partial(
        Loader,
        config=config.loader,
        rank_slice=rank_slice,
        seed=run.seed,
        device=device,
        slab=slab,
        agree=agree,
    )
    with (
        closing(load(run.train, shuffle=config.shuffle, ragged="drop")) as train,
        closing(load(run.validation, shuffle=False, ragged="pad")) as validation,
    ):
        yield train, validation
