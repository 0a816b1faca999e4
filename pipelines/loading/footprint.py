"""What a loader holds in memory, by formula: docs/data-path.md derives it."""

from __future__ import annotations

from pipelines.dataset.dataset import SampleDataset
from pipelines.formats.npy import Npy
from pipelines.formats.packed.decode import DECODE_CHUNK_VOXELS
from pipelines.formats.packed.encode import slices_per_chunk
from pipelines.formats.packed.format import PackedFormat
from pipelines.formats.packed.gather_cpu import SCRATCH
from pipelines.loading.config import LoaderConfig

READ_AHEAD = 2
"""Batches whose files are being read before DALI asks for them."""

_GATHER_SCRATCH = 8 + 8
"""Bytes that a GPU needs for each voxel of the sample that it gathers."""

_ROWS = 1 << 16
"""Of a sample's table; one with more has more than the two byte planes that are reckoned with."""


def host_ahead(config: LoaderConfig) -> int:
    """Batches of packed samples on their way on a host: a sample for each thread, and prefetch ready ones."""
    return config.prefetch + -(-config.threads // config.batch_size)


def host_bytes(split: SampleDataset, config: LoaderConfig, device: str = "cpu") -> int:
    """Bytes of host memory that a loader of `split` for a `device` of that kind holds once it is under way.

    Volumes, on the CPU, are batches being made, ready or in use. Of packed samples, those have
    payloads too; of others, as many again as are read before DALI asks for them. Files that are
    mapped are the kernel's, not counted.
    """
    volume, size = 2 * split.spec.bytes, split.spec.size
    packed = split.format_name == PackedFormat.name
    if packed and device == "cpu":
        batches = host_ahead(config) + 1
        voxels = max(DECODE_CHUNK_VOXELS, slices_per_chunk(size) * size**2)
        scratch = config.threads * SCRATCH * min(voxels, size**3)
        return config.batch_size * batches * (volume + _longest(split)) + scratch
    batches = config.prefetch + 1
    volumes = config.batch_size * batches * volume if device == "cpu" else 0
    if split.format_name == Npy.name and not config.direct_io and config.on_bad_sample == "fail":
        return volumes
    payload = _longest(split) if packed else split.spec.bytes
    return volumes + config.batch_size * (batches + READ_AHEAD + 1) * payload


def device_bytes(split: SampleDataset, config: LoaderConfig) -> int:
    """Bytes of GPU memory that a loader of `split` holds there: the batch in use, and what DALI has ready."""
    volume, voxels = 2 * split.spec.bytes, split.spec.size**3
    if split.format_name != PackedFormat.name:
        return config.batch_size * (volume + config.prefetch * (split.spec.bytes + volume))
    table = min(voxels, _ROWS) * split.spec.channels * (2 + 4)
    ready = _longest(split) + 2 * voxels + table
    return config.batch_size * (volume + config.prefetch * ready) + _GATHER_SCRATCH * voxels


def _longest(split: SampleDataset) -> int:
    """Bytes of the longest packed sample."""
    return int(split.extents.lengths.max(initial=0)) if split.extents else 0
