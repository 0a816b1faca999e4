"""Loading of samples from storage into batches on the training device.

In: the samples of a folder and a `LoaderConfig`. Out: `Batch` objects in the order of `plan_epoch`: volumes
(B, C, D, H, W) in channels-last memory format, and targets (B, 4).
"""
