"""From samples on storage to batches on the device that trains.

In: the samples of a folder and a `LoaderConfig`. Out: `Batch` objects in the order of `plan_epoch`: volumes
(B, C, D, H, W) in channels-last memory format, and targets (B, 4).
"""
