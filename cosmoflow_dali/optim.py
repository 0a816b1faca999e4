"""The optimizer, and Keras's momentum rule on top of anybody's SGD.

Keras keeps the learning rate inside the momentum buffer (v = m v - lr g, w += v), torch and apex
keep it outside (b = m b + g, w -= lr b). With v = -lr b the two are one as long as the rate
stands still; when it changes, scaling the buffers by old / new keeps lr b, and so v, as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pipelines.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SGDConfig:
    """SGD with Keras's momentum.

    weight_decay: L2 on the model's `decayed_parameters`, in PyTorch's units: Keras's l2 doubled.
    """

    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError("optimizer.momentum", self.momentum, "must be at least 0 and below 1")
        if self.weight_decay < 0:
            raise ConfigError("optimizer.weight_decay", self.weight_decay, "must be at least 0")


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """Adam, for the open network."""

    kind: Literal["adam"] = "adam"
    betas: tuple[float, ...] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                "optimizer.betas", self.betas, "must be two numbers, each at least 0 and below 1"
            )


def build_optimizer(config: SGDConfig | AdamConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `model`'s parameters; its rate is set for each step by `set_lr`."""
    if isinstance(config, AdamConfig):
        first, second = config.betas
        return torch.optim.Adam(model.parameters(), betas=(first, second), fused=True)
    decayed = model.decayed_parameters() if config.weight_decay else []  # type: ignore[operator]
    among = {id(parameter) for parameter in decayed}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in among]
    groups = [
        {"params": rest, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": config.weight_decay},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, momentum=config.momentum, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give the coming step the learning rate `lr`, by Keras's rule where there is momentum."""
    for group in optimizer.param_groups:
        old = float(group["lr"])
        group["lr"] = lr
        if "momentum" not in group or lr == old:
            continue
        for parameter in group["params"]:
            buffer = (
                optimizer.state[parameter].get("momentum_buffer") if parameter in optimizer.state else None
            )
            if buffer is not None:
                buffer.mul_(old / lr)  # no schedule comes down to 0
