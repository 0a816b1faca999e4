"""Filling of the nodes' caches before training."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable

from cosmoflow_dali.training.logs import RunLogs
from cosmoflow_dali.training.run_dir import Run
from pipelines.distributed.session import Session
from pipelines.loading.reader import Reader
from pipelines.slab import Slab
from pipelines.storage.cache import CachedStorage
from pipelines.storage.parallel import map_ahead

logger = logging.getLogger(__name__)


def fill_cache(run: Run, session: Session, logs: RunLogs, *, periodic: bool) -> Run:
    """Fetch what each node's ranks read of both splits, if `data.cache.fill` is set; all ranks call this.

    Args:
        run: The run.
        session: The ranks; those of a node that read the same divide the samples.
        logs: Of this rank.
        periodic: As of `open_loaders`.

    Returns:
        The run, with the duration.

    Raises:
        UserError: On every rank, if a sample cannot be read.
    """
    cache, loader, spatial = run.config.data.cache, run.config.loader, run.config.parallel.spatial
    if cache is None or not cache.fill:
        return run
    start, world = time.perf_counter(), session.world
    if run.checkpoint is None:
        logs.mlperf.start("staging_start")
    slab = Slab(world.rank % spatial, spatial, periodic) if spatial > 1 else None
    first = world.rank - world.local_rank
    same = [rank for rank in range(first, first + world.local_size) if (rank - world.rank) % spatial == 0]

    def fill() -> None:
        for split in (run.train, run.validation):
            own = range(same.index(world.rank), len(split), len(same))
            _read(Reader(split, loader.on_bad_sample, apply_log=loader.apply_log, slab=slab), own)

    session.run_on_all_ranks(fill)
    seconds = time.perf_counter() - start
    if run.checkpoint is None:
        logs.mlperf.end("staging_stop", metadata={"staging_duration": seconds})
    logger.info("filled the caches of the nodes, %s, in %.1f s", cache.dir, seconds)
    return dataclasses.replace(run, seconds=run.seconds | {"staging": seconds})


def _read(reader: Reader, indices: Iterable[int]) -> None:
    """Read the samples `indices`, until the cache is full."""
    storage = reader.split.storage
    assert isinstance(storage, CachedStorage)
    for _ in map_ahead(reader.payload, indices):
        if not storage.keeps:
            break
