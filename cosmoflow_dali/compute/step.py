"""One training step's arithmetic: the only place that runs forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from pipelines.plan import derive_seed
from pipelines.sample import Batch

Precision: TypeAlias = Literal["fp32", "tf32", "fp16", "bf16"]
"""In what the network computes; weights, momentum, loss and logs are float32 in all of them.

fp32: IEEE throughout. tf32: GPUs round what they multiply to 10 bits of mantissa; elsewhere the same as
fp32. fp16, bf16: autocast; fp16 with a scaled loss.
"""

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def input_dtype(precision: Precision) -> torch.dtype:
    """In what the first convolution reads its input."""
    return _AUTOCAST.get(precision, torch.float32)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the network computes at `precision`; its weights stay float32."""
    if precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, _AUTOCAST[precision])


def configure_float32(precision: Precision) -> None:
    """Say for this process what float32 is to a GPU's matrix units; torch lets cuDNN round it unasked."""
    # By the names that torch before 2.9 has too.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """What scales the loss at fp16 and leaves out updates whose gradients overflow; idle otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def forward_backward(
    model: nn.Module,
    batch: Batch,
    precision: Precision,
    scaler: torch.amp.GradScaler | None = None,
    micro_batch: int | None = None,
) -> torch.Tensor:
    """Add the gradients of the batch's mean squared error to those in `model`; the loss, on the device.

    With `scaler` they are of the scaled loss. With `micro_batch`, which divides the batch, so many
    samples are worked on at a time. Under DistributedDataParallel the gradients are the mean over
    ranks, so, batches being equal, those of the global batch; ranks exchange them once.
    """
    size = len(batch.target)
    parts = range(0, size, micro_batch or size)
    losses = []
    for first in parts:
        part = slice(first, first + (micro_batch or size))
        waits = isinstance(model, DistributedDataParallel) and first != parts[-1]
        with model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with record_function("forward"), autocast(precision, batch.volume.device):
                prediction = model(batch.volume[part])
                loss = functional.mse_loss(prediction.float(), batch.target[part]) / len(parts)
            with record_function("backward"):
                (loss if scaler is None else scaler.scale(loss)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed what a step draws (dropout) from its place alone, so that no random state need be saved."""
    torch.manual_seed(derive_seed(seed, "step", epoch, step, rank))
