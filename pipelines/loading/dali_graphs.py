"""DALI graphs: samples from the reader threads, or from files, to transformed samples on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.formats.packed.gather_gpu import PackedArrays
from pipelines.loading.config import LoaderConfig
from pipelines.loading.transforms import lookup_node, transform_node


def define_counts_graph(
    inputs: deque[list[npt.NDArray[np.int16]]], config: LoaderConfig, device_id: int | None
) -> Any:
    """Return a pipeline, not yet built, that transforms counts.

    Args:
        inputs: Queue of batches, each run takes the oldest: counts (D, H, W, C) int16 of each sample. DALI
            reads them in place: they must be kept until their batch is output.
        config: Settings of the loader.
        device_id: GPU to run on; None for the CPU.

    Returns:
        A pipeline with one output, (B, D, H, W, C) float32 on that device.
    """
    from nvidia.dali import fn

    def samples() -> Any:
        counts = fn.external_source(source=lambda: inputs.popleft(), batch=True, no_copy=True)
        if device_id is not None:
            counts = counts.gpu()
        return transform_node(counts, apply_log=config.apply_log)

    return _define(samples, config, device_id)


def define_files_graph(files: Sequence[str], config: LoaderConfig, device_id: int | None) -> Any:
    """Return a pipeline, not yet built, that reads and transforms the counts in .npy `files`, in a cycle.

    On a GPU DALI reads them into its memory, with GPUDirect Storage where that is available. Output as of
    `define_counts_graph`.
    """
    from nvidia.dali import fn

    def samples() -> Any:
        counts = fn.readers.numpy(device="cpu" if device_id is None else "gpu", files=files)
        return transform_node(counts, apply_log=config.apply_log)

    return _define(samples, config, device_id)


def define_packed_graph(inputs: deque[PackedArrays], config: LoaderConfig, device_id: int | None) -> Any:
    """Return a pipeline, not yet built, that inflates packed samples on a GPU.

    Without a GPU it can be serialised, but not built.

    Args:
        inputs: Queue of batches, each run takes the oldest: five lists with one array per sample. These are
            the bytes of its LZ4 blocks (uint8); the offset and length of each block (int32); the length of
            every inflated block (int32, one number); its table (rows, C) of counts (int16). DALI reads them
            in place.
        config: Settings of the loader.
        device_id: GPU to run on.

    Returns:
        A pipeline with two outputs per sample: the inflated blocks (blocks, voxels) uint8, and the values
        of the table (rows, C) float32: logarithms or counts, NaN for negative ones.
    """
    from nvidia.dali import fn, types

    def samples() -> Any:
        blocks, starts, sizes, voxels, table = fn.external_source(
            source=lambda: inputs.popleft(),
            num_outputs=5,
            batch=True,
            no_copy=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.INT16],
            ndim=[1, 1, 1, 1, 2],
        )
        planes = fn.decoders.inflate(
            blocks.gpu(),
            algorithm="LZ4",
            chunk_offsets=starts,
            chunk_sizes=sizes,
            shape=voxels,
            dtype=types.UINT8,
        )
        return planes, lookup_node(table.gpu(), apply_log=config.apply_log)

    return _define(samples, config, device_id)


def _define(samples: Callable[[], Any], config: LoaderConfig, device_id: int | None) -> Any:
    """Return a pipeline, not yet built, whose outputs are the nodes that `samples` returns."""
    from nvidia.dali import pipeline_def

    decorate = pipeline_def(
        batch_size=config.batch_size,
        num_threads=config.threads,
        device_id=device_id,
        prefetch_queue_depth=config.prefetch,
        # The static executor outputs tensors without a copy, at a third of the cost.
        exec_dynamic=False,
    )
    return decorate(samples)()
