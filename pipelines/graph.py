"""The one DALI graph: counts from the reader threads, to the device that trains, and transformed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.transforms import transform_node


def build_pipeline(
    source: Callable[[], list[Any]],
    *,
    batch_size: int,
    threads: int,
    prefetch: int,
    device_id: int | None,
    apply_log: bool,
) -> Any:
    """A built pipeline whose every run takes a batch of counts, (D, H, W, C) int16 each, from `source`.

    It puts out (batch_size, D, H, W, C) float32 on GPU `device_id`, or on the CPU for None.
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

    pipeline = samples()
    pipeline.build()
    return pipeline
