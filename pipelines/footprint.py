"""What a loader holds in memory, by formula: docs/data-path.md derives it."""

from __future__ import annotations

from pipelines.config import LoaderConfig
from pipelines.dataset import Split
from pipelines.formats.packed import PackedFormat
from pipelines.packed import TOGETHER
from pipelines.packing import slices_of

READ_AHEAD = 2
"""Batches whose files are being read before DALI asks for them."""

_CHUNK_SCRATCH = 2 + 2 + 8
"""Bytes that a decoding thread needs for each voxel that it decodes at a time."""


def host_ahead(config: LoaderConfig) -> int:
    """Batches of packed samples on their way on a host: a sample for each thread, and prefetch ready ones."""
    return config.prefetch + -(-config.threads // config.batch_size)


def host_bytes(split: Split, config: LoaderConfig) -> int:
    """Bytes of host memory that a loader of `split` on the CPU holds once it is under way.

    Volumes are batches being made, ready or in use. Of packed samples, those have payloads too; of
    others, as many again as are read before DALI asks for them. Files that are mapped are the
    kernel's, not counted.
    """
    volume = 2 * split.spec.bytes
    if split.form == PackedFormat.name and split.extents:
        batches = host_ahead(config) + 1
        payloads = config.batch_size * batches * int(split.extents.lengths.max())
        size = split.spec.size
        voxels = max(TOGETHER, slices_of(size) * size**2)
        scratch = config.threads * _CHUNK_SCRATCH * min(voxels, size**3)
        return config.batch_size * batches * volume + payloads + scratch
    batches = config.prefetch + 1
    volumes = config.batch_size * batches * volume
    if split.form == "npy" and not config.direct_io:
        return volumes
    return volumes + config.batch_size * (batches + READ_AHEAD + 1) * split.spec.bytes
