"""DALI graphs: samples from the reader threads, or from files, to transformed samples on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipelines.formats.packed.codecs import Codec
from pipelines.formats.packed.gather_gpu import Arrays
from pipelines.loading.config import LoaderConfig
from pipelines.loading.transforms import lookup_node, transform_node


def counts_node(inputs: deque[list[npt.NDArray[np.int16]]], device: torch.device, *, apply_log: bool) -> Any:
    """Return the node of transformed counts, (B, D, H, W, C) float32 on `device`.

    Args:
        inputs: Queue of batches, of which each run takes the oldest: counts (D, H, W, C) int16 of each
            sample. DALI reads them in place: they must be kept until their batch is output.
        device: Device of the output.
        apply_log: See `LoaderConfig`.
    """
    from nvidia.dali import fn

    counts = fn.external_source(source=lambda: inputs.popleft(), batch=True, no_copy=True)
    return transform_node(counts.gpu() if device.type == "cuda" else counts, apply_log=apply_log)


def files_node(files: Sequence[str], device: torch.device, *, apply_log: bool) -> Any:
    """Return the same node as `counts_node` for counts that DALI reads from .npy `files`, in a cycle.

    On a GPU DALI reads them into its memory, with GPUDirect Storage where that is available.
    """
    from nvidia.dali import fn

    counts = fn.readers.numpy(device="gpu" if device.type == "cuda" else "cpu", files=files)
    return transform_node(counts, apply_log=apply_log)


def packed_nodes(
    inputs: deque[list[Arrays]], codec: Codec, device: torch.device, *, apply_log: bool
) -> tuple[Any, Any, Any]:
    """Return the nodes of packed samples, for a gather on `device`.

    With LZ4 and without a GPU a pipeline of them can be serialised, but not built.

    Args:
        inputs: Queue of batches, of which each run takes the oldest: the arrays of each sample. These are the
            bytes of its blocks of symbols (uint8); for LZ4, which DALI inflates, the offset and length of
            each block (int32), and the length of every inflated one (int32, one number); the escapes (planes,
            escapes + 1) uint8; the table (rows, C) of counts (int16). DALI reads them in place.
        codec: Codec of the blocks.
        device: Device of the outputs.
        apply_log: See `LoaderConfig`.

    Returns:
        For each sample the bytes of the blocks, for LZ4 inflated (blocks, voxels of a block); the escapes;
        and the values of the table (rows, C) float32: logarithms or counts, NaN for negative ones.
    """
    from nvidia.dali import fn, types

    blocks = [(types.UINT8, 1), (types.INT32, 1), (types.INT32, 1), (types.INT32, 1)]
    kinds = [*(blocks if codec == Codec.LZ4 else blocks[:1]), (types.UINT8, 2), (types.INT16, 2)]
    symbols, *extents, escapes, table = fn.external_source(
        source=lambda: list(map(list, zip(*inputs.popleft(), strict=True))),
        num_outputs=len(kinds),
        batch=True,
        no_copy=True,
        dtype=[dtype for dtype, _ in kinds],
        ndim=[ndim for _, ndim in kinds],
    )
    if codec == Codec.LZ4:
        starts, sizes, voxels = extents
        symbols = fn.decoders.inflate(
            symbols.gpu(),
            algorithm="LZ4",
            chunk_offsets=starts,
            chunk_sizes=sizes,
            shape=voxels,
            dtype=types.UINT8,
        )
    elif device.type == "cuda":
        symbols = symbols.gpu()
    if device.type == "cuda":
        escapes, table = escapes.gpu(), table.gpu()
    return symbols, escapes, lookup_node(table, apply_log=apply_log)


def define_pipeline(define_nodes: Callable[[], Any], config: LoaderConfig, device: torch.device) -> Any:
    """Return a pipeline on `device`, not yet built, that outputs the nodes of `define_nodes`."""
    from nvidia.dali import pipeline_def

    if device.type == "cuda" and device.index is None:
        raise ValueError("DALI would build a pipeline for the CPU: the device needs an index, as cuda:0")
    return pipeline_def(
        define_nodes,
        batch_size=config.batch_size,
        num_threads=config.threads,
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=config.prefetch,
        # The static executor outputs tensors without a copy, at a third of the cost.
        exec_dynamic=False,
    )()
