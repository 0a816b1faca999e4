"""What a loader holds in memory, by formula: docs/data-path.md derives it."""

from __future__ import annotations

from pipelines.config import LoaderConfig
from pipelines.dataset import Split
from pipelines.formats.packed import PackedFormat
from pipelines.packing import slices_of

READ_AHEAD = 2
"""Batches whose files are being read before the decoder asks for them."""

_CHUNK_SCRATCH = 2 + 2 + 8
"""Bytes that a decoding thread needs for each voxel of a chunk."""


def host_bytes(split: Split, config: LoaderConfig) -> int:
    """Bytes of host memory that a loader of `split` on the CPU holds once it is under way.

    Payloads wait in READ_AHEAD + 1 batches, and in the prefetch + 1 that the decoder has; as many
    batches of volumes are being made, or used. Files that are mapped are the kernel's, not counted.
    """
    volume = 2 * split.spec.bytes
    waiting = config.batch_size * (READ_AHEAD + 1 + config.prefetch + 1)
    volumes = config.batch_size * (config.prefetch + 1) * volume
    if split.form == PackedFormat.name and split.extents:
        payload = int(split.extents.lengths.max())
        size = split.spec.size
        scratch = config.threads * _CHUNK_SCRATCH * slices_of(size) * size**2
        return volumes + waiting * payload + scratch
    return volumes + (0 if split.form == "npy" and not config.direct_io else waiting * split.spec.bytes)
