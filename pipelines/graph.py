"""The DALI graphs: what comes from the reader threads, to the device that trains, and transformed there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipelines.transforms import lookup_node, transform_node


def define_counts_graph(
    source: Callable[[], Sequence[Any]],
    *,
    batch_size: int,
    threads: int,
    prefetch: int,
    device_id: int | None,
    apply_log: bool,
) -> Any:
    """A pipeline, not yet built, that takes a batch of counts from `source`, (D, H, W, C) int16 each.

    Its every run puts out (batch_size, D, H, W, C) float32 on GPU `device_id`, or on the CPU for None.
    """
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        # The static executor hands tensors out without copying them, at a third of the cost.
        exec_dynamic=False,
    )
    def samples() -> Any:
        # No copy: the loader keeps the payloads until their batch has come out.
        counts = fn.external_source(source=source, batch=True, no_copy=True)
        if device_id is not None:
            counts = counts.gpu()
        return transform_node(counts, apply_log=apply_log)

    return samples()


def define_files_graph(
    files: Sequence[str],
    *,
    batch_size: int,
    threads: int,
    prefetch: int,
    device_id: int | None,
    apply_log: bool,
) -> Any:
    """A pipeline, not yet built, of the counts in the .npy `files`, in their order, over and over.

    DALI reads them itself: for a GPU `device_id` into its memory, by GPUDirect Storage where there is
    that. It puts out what `define_counts_graph`'s does.
    """
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=False,
    )
    def samples() -> Any:
        counts = fn.readers.numpy(device="cpu" if device_id is None else "gpu", files=files)
        return transform_node(counts, apply_log=apply_log)

    return samples()


def define_packed_graph(
    source: Callable[[], tuple[Sequence[Any], ...]],
    *,
    batch_size: int,
    threads: int,
    prefetch: int,
    device_id: int | None,
    apply_log: bool,
) -> Any:
    """A pipeline, not yet built, that takes packed samples to GPU `device_id` as they are, and inflates them.

    Its every run takes of each sample, from `source`: the bytes of its LZ4 blocks (uint8), where in
    them each starts, how long each is, how long each becomes (int32; one for all), and its table
    (rows, C) of counts (int16). It puts out the blocks inflated, (blocks, voxels) uint8, and the
    table's values (rows, C) float32: logarithms, or the counts, and NaN of -1. With a `device_id` of
    None it can be serialised, but not be built: DALI inflates on GPUs only.
    """
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=False,
    )
    def samples() -> Any:
        blocks, starts, sizes, voxels, table = fn.external_source(
            source=source,
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
        return planes, lookup_node(table.gpu(), apply_log=apply_log)

    return samples()
