"""The DALI graphs: what comes from the reader threads, to the device that trains, and transformed there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.loading.transforms import lookup_node, transform_node


@dataclass(frozen=True, slots=True)
class GraphSettings:
    """What every graph needs to know.

    batch_size: samples a run. threads: of DALI. prefetch: runs that it is ahead.
    device_id: of the GPU, None for the CPU. apply_log: see `LoaderConfig`.
    """

    batch_size: int
    threads: int
    prefetch: int
    device_id: int | None
    apply_log: bool

    def define(self, samples: Callable[[], Any]) -> Any:
        """A pipeline, not yet built, of the nodes that `samples` returns."""
        from nvidia.dali import pipeline_def

        decorate = pipeline_def(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=self.device_id,
            prefetch_queue_depth=self.prefetch,
            # The static executor hands tensors out without copying them, at a third of the cost.
            exec_dynamic=False,
        )
        return decorate(samples)()


def define_counts_graph(source: Callable[[], Sequence[Any]], settings: GraphSettings) -> Any:
    """A pipeline, not yet built, that takes a batch of counts from `source`, (D, H, W, C) int16 each.

    Its every run puts out (B, D, H, W, C) float32, on the device of `settings`.
    """
    from nvidia.dali import fn

    def samples() -> Any:
        # No copy: the loader keeps the payloads until their batch has come out.
        counts = fn.external_source(source=source, batch=True, no_copy=True)
        if settings.device_id is not None:
            counts = counts.gpu()
        return transform_node(counts, apply_log=settings.apply_log)

    return settings.define(samples)


def define_files_graph(files: Sequence[str], settings: GraphSettings) -> Any:
    """A pipeline, not yet built, of the counts in the .npy `files`, in their order, over and over.

    DALI reads them itself: for a GPU into its memory, by GPUDirect Storage where there is that. It
    puts out what `define_counts_graph`'s does.
    """
    from nvidia.dali import fn

    def samples() -> Any:
        counts = fn.readers.numpy(device="cpu" if settings.device_id is None else "gpu", files=files)
        return transform_node(counts, apply_log=settings.apply_log)

    return settings.define(samples)


def define_packed_graph(source: Callable[[], tuple[Sequence[Any], ...]], settings: GraphSettings) -> Any:
    """A pipeline, not yet built, that takes packed samples to a GPU as they are, and inflates them.

    Its every run takes of each sample, from `source`: the bytes of its LZ4 blocks (uint8), where in
    them each starts, how long each is, how long each becomes (int32; one for all), and its table
    (rows, C) of counts (int16). It puts out the blocks inflated, (blocks, voxels) uint8, and the
    table's values (rows, C) float32: logarithms, or the counts, and NaN of -1. For the CPU it can be
    serialised, but not be built: DALI inflates on GPUs only.
    """
    from nvidia.dali import fn, types

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
        return planes, lookup_node(table.gpu(), apply_log=settings.apply_log)

    return settings.define(samples)
