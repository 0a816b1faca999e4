"""One training step's arithmetic: the only place that runs forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from pipelines.plan import derive_seed
from pipelines.sample import Batch

Precision: TypeAlias = Literal["fp32", "bf16"]


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the network computes at `precision`; its weights stay float32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def forward_backward(model: nn.Module, batch: Batch, precision: Precision) -> torch.Tensor:
    """Leave the gradients of the batch's mean squared error in `model`; the loss, on the device.

    Under DistributedDataParallel the gradients are the mean over ranks, so, batches being equal,
    those of the global batch.
    """
    with autocast(precision, batch.volume.device):
        prediction = model(batch.volume)
    loss = functional.mse_loss(prediction.float(), batch.target)
    loss.backward()
    return loss.detach()


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed what a step draws (dropout) from its place alone, so that no random state need be saved."""
    torch.manual_seed(derive_seed(seed, "step", epoch, step, rank))
