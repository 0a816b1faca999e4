"""The optimizers, with Keras's momentum rule on top of any SGD.

Keras keeps the learning rate inside the momentum buffer (v = m v - lr g, w += v); torch and apex keep it
outside (b = m b + g, w -= lr b). With v = -lr b the rules agree while the rate is constant. When it changes,
scaling the buffers by old / new preserves lr b, and so v.

A CUDA graph can hold the step of torch's fused optimizers, which can read the rate from the device. Momentum
is scaled before the graph, only when the rate changes: in each step it would move 8 bytes a weight more.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from cosmoflow_dali.compute.step import Precision
from pipelines.errors import ConfigError, check_field

_LEAST_LR = 1e-20
"""Replaces a rate of 0, by which no buffer can be scaled; the gradient's share is lost in rounding."""

_BUILD_APEX = "build NVIDIA's from source as the README describes"


@dataclass(frozen=True, slots=True)
class SGDConfig:
    """SGD with Keras's momentum rule.

    Args:
        kind: Selects this optimizer.
        momentum: Momentum, at least 0 and below 1.
        weight_decay: L2 penalty of the first two dense layers, in PyTorch's units (twice Keras's l2).
            Requires dropout 0; given without a dropout, it sets dropout to 0.
        implementation: "auto" uses apex's FusedSGD on a GPU if NVIDIA's apex is installed, except at
            precision fp16 and with the engine "graph", which cannot hold its step; otherwise torch's fused
            SGD.
    """

    kind: Literal["sgd"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    implementation: Literal["auto", "apex", "fused"] = "auto"

    def __post_init__(self) -> None:
        check_field(self, "momentum", 0 <= self.momentum < 1, "must be at least 0 and below 1")
        check_field(self, "weight_decay", self.weight_decay >= 0, "must be at least 0")


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """Adam.

    Args:
        kind: Selects this optimizer.
        betas: Decay rates of the two moment estimates, each at least 0 and below 1.
    """

    kind: Literal["adam"] = "adam"
    betas: tuple[float, ...] = (0.9, 0.99)

    def __post_init__(self) -> None:
        valid = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        check_field(self, "betas", valid, "must be two numbers, each at least 0 and below 1")


def build_optimizer(
    config: SGDConfig | AdamConfig, model: nn.Module, precision: Precision = "fp32", engine: str = "eager"
) -> torch.optim.Optimizer:
    """Return the optimizer of `model`'s parameters on their device; `set_lr` sets its rate for each step.

    Its state exists from the start: a CUDA graph that made it would do so in each step.

    Raises:
        ConfigError: The implementation that `config` names is not available.
    """
    if isinstance(config, AdamConfig):
        first, second = config.betas
        adam = torch.optim.Adam(model.parameters(), betas=(first, second), fused=True)
        for parameter in model.parameters():
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        return adam
    decayed = model.decayed_parameters() if config.weight_decay else []  # type: ignore[operator]
    among = {id(parameter) for parameter in decayed}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in among]
    groups = [{"params": rest, "weight_decay": 0.0}]
    if decayed:
        groups.append({"params": decayed, "weight_decay": config.weight_decay})
    optimizer = _build_sgd(config, groups, rest[0].device, precision, engine)
    for parameter in model.parameters():
        # If the scaler skips the first step, torch's fused SGD would continue from uninitialised momentum.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def describe(
    optimizer: torch.optim.Optimizer,
    config: SGDConfig | AdamConfig,
    device: torch.device,
    precision: Precision = "fp32",
    engine: str = "eager",
) -> str:
    """Return a one-line description of the optimizer for logs."""
    name = type(optimizer).__name__
    if type(optimizer).__module__.startswith("apex"):
        return f"apex {name}"
    wants_apex = isinstance(config, SGDConfig) and config.implementation == "auto" and device.type == "cuda"
    return f"torch fused {name}" + (f" ({_apex_sgd(device, precision, engine)[1]})" if wants_apex else "")


def _build_sgd(
    config: SGDConfig, groups: list[dict[str, Any]], device: torch.device, precision: Precision, engine: str
) -> torch.optim.Optimizer:
    """Return the fastest available implementation that `config` allows."""
    kind, lr, momentum = config.implementation, 1e-3, config.momentum
    if kind == "apex" or (kind == "auto" and device.type == "cuda"):
        fused, reason = _apex_sgd(device, *((precision, engine) if kind == "auto" else ("fp32", "eager")))
        if fused is not None:
            return fused(groups, lr=lr, momentum=momentum)
        if kind == "apex":
            raise ConfigError("optimizer.implementation", kind, reason)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)


def _apex_sgd(
    device: torch.device, precision: Precision, engine: str
) -> tuple[Callable[..., torch.optim.Optimizer] | None, str]:
    """Return NVIDIA's FusedSGD, or None and the reason."""
    if device.type != "cuda":
        return None, "apex needs a GPU; use auto or fused"
    if precision == "fp16":
        return None, "with apex's, the gradient scaler of fp16 would wait for the GPU in every step"
    if engine == "graph":
        return None, "a CUDA graph cannot hold the step of apex's"
    if importlib.util.find_spec("apex") is None:
        return None, f"apex is not installed; {_BUILD_APEX}"
    try:
        # Without its CUDA extensions, apex can be imported but not used.
        importlib.import_module("amp_C")
        found: Callable[..., torch.optim.Optimizer] = importlib.import_module("apex.optimizers").FusedSGD
    except (ImportError, AttributeError):
        return None, f"the installed apex is not NVIDIA's or lacks its CUDA extensions; {_BUILD_APEX}"
    return found, ""


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load `state`, which may come from another implementation of the same rule."""
    own = [{**group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group |= {key: mine[key] for key in mine.keys() & {"fused", "foreach", "capturable"}}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, rescaling momentum by Keras's rule."""
    lr = max(lr, _LEAST_LR)
    for group in optimizer.param_groups:
        old = float(group["lr"])
        group["lr"] = lr
        if "momentum" not in group or lr == old:
            continue
        states = [optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state]
        buffers = [state["momentum_buffer"] for state in states if state.get("momentum_buffer") is not None]
        if buffers:
            torch._foreach_mul_(buffers, old / lr)


def why_outside_graph(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> str:
    """Return why a CUDA graph cannot hold the step of `optimizer`; "" if it can."""
    if scaler.is_enabled():
        return "fp16's gradient scaler decides about it"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} takes the learning rate from the host"
    return ""


@contextmanager
def capturable(optimizer: torch.optim.Optimizer, lr: torch.Tensor) -> Iterator[None]:
    """Let steps in the body be captured, which read the rate from `lr`, (), float32, on the device."""
    own = [{**group} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group |= {"lr": lr, "capturable": True}
    try:
        yield
    finally:
        for group, mine in zip(optimizer.param_groups, own, strict=True):
            group.clear()
            group |= mine
