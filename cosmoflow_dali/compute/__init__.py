"""The training step: forward and backward pass, engines, optimizers and learning-rate schedules.

In: a network and batches on its device. Out: updated weights, and the loss as a tensor on the device.
"""
