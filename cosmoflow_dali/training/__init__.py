"""A run: the training loop, evaluation, checkpoints, logs and the run folder.

In: a `TrainConfig` and loaders. Out: a run folder with checkpoints and logs, and how training ended.
"""
