"""The arithmetic of a training step: the only module that runs forward and backward passes."""

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
"""Precision of the network; weights, momentum, loss and logs are float32 in each.

fp32: IEEE single precision. tf32: GPUs round factors to 10 bits of mantissa; fp32 elsewhere. fp16, bf16:
autocast; fp16 with loss scaling.
"""

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def input_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype in which the first convolution reads its input."""
    return _AUTOCAST.get(precision, torch.float32)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context for a forward pass at `precision`; weights stay float32."""
    if precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, _AUTOCAST[precision])


def configure_float32(precision: Precision) -> None:
    """Allow TF32 in this process except at precision fp32; torch's default allows it in cuDNN."""
    # These names exist in torch before 2.9 too.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return a scaler that scales the loss at fp16 and skips updates with overflowing gradients."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def forward_backward(
    model: nn.Module,
    batch: Batch,
    precision: Precision,
    scaler: torch.amp.GradScaler | None = None,
    micro_batch: int | None = None,
) -> torch.Tensor:
    """Accumulate the gradients of the batch's mean squared error in `model`.

    Under DistributedDataParallel the gradients are the mean over ranks, which is that of the global batch as
    all batches are equal; they are reduced once.

    Args:
        scaler: Scales the loss for the gradients.
        micro_batch: Samples processed at a time; must divide the batch.

    Returns:
        The unscaled loss, (), on the device.
    """
    size = len(batch.target)
    starts = range(0, size, micro_batch or size)
    losses = []
    for start in starts:
        part = slice(start, start + (micro_batch or size))
        accumulates = isinstance(model, DistributedDataParallel) and start != starts[-1]
        with model.no_sync() if accumulates else nullcontext():  # type: ignore[operator]
            with record_function("forward"), autocast(precision, batch.volume.device):
                prediction = model(batch.volume[part])
                loss = functional.mse_loss(prediction.float(), batch.target[part]) / len(starts)
            with record_function("backward"):
                (loss if scaler is None else scaler.scale(loss)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Seed the dropout of a step from its position, so that no random state has to be saved."""
    torch.manual_seed(derive_seed(seed, "step", epoch, step, rank))
