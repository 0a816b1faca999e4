"""Check of a GPU's 3D convolutions before training: versions with known faults, and one convolution.

Sources: issues and changes of PyTorch, whose numbers the messages give.
"""

from __future__ import annotations

import logging

import torch

from cosmoflow_dali.compute.kernels import Shape, choose
from cosmoflow_dali.compute.step import Precision
from cosmoflow_dali.models.blocks import pool_then_activate
from pipelines.errors import ConfigError

_CUDNN_FIXED = 91500
"""cuDNN 9.15, the first version after 9.8 whose half-precision 3D convolutions torch uses."""

logger = logging.getLogger(__name__)


def check_convolutions(precision: Precision, device: torch.device) -> None:
    """Check that torch and cuDNN compute 3D convolutions correctly at `precision` on `device`.

    A combination that is slow, or wrong for some shapes, is logged; so is the remedy. On a CPU nothing is
    checked.

    Raises:
        ConfigError: cuDNN is known to be wrong at `precision`.
        UserError: One convolution and its gradients differ from float64.
    """
    if device.type != "cuda":
        return
    if fault := known_fault(precision, torch.__version__, torch.backends.cudnn.version() or 0):
        logger.warning("%s", fault)
    choose("check of convolutions", {"torch": pool_then_activate}, _SHAPE, precision, device, 0.0)


_SHAPE = Shape(batch=1, channels=16, filters=32, edge=16)
"""Of the convolution that is checked."""


def known_fault(precision: Precision, torch_version: str, cudnn_version: int) -> str | None:
    """Return the known fault of these versions that makes training slow or may make it wrong, or None.

    Args:
        precision: Of the training step.
        torch_version: As in `torch.__version__`.
        cudnn_version: As of `torch.backends.cudnn.version()`.

    Raises:
        ConfigError: The versions compute `precision` incorrectly.
    """
    release = torch_version.split("+")[0]
    numbers = tuple(int(part) for part in release.split(".")[:2])
    versions = f"torch {release} with cuDNN {_dotted(cudnn_version)}"
    if precision == "tf32" and 91002 <= cudnn_version <= 91500:
        reason = f"{versions} may compute 3D convolutions wrongly (pytorch#167024); use bf16, fp16 or fp32"
        raise ConfigError("compute.precision", precision, reason)
    if precision not in ("fp16", "bf16") or not cudnn_version >= 90800:
        return None
    if release == "2.9.0" or (numbers >= (2, 9) and cudnn_version < _CUDNN_FIXED):
        return (
            f"{versions} computes 3D convolutions in {precision} without cuDNN: several times slower, with "
            "17 times the memory (pytorch#166643); install torch 2.9.1 and cuDNN 9.15, or later ones"
        )
    if numbers < (2, 9) and cudnn_version < _CUDNN_FIXED:
        return (
            f"{versions} computes some large 3D convolutions in {precision} wrongly (pytorch#163539); "
            "install torch 2.9.1 and cuDNN 9.15, or later ones"
        )
    return None


def _dotted(version: int) -> str:
    """Return cuDNN's `version` as in 9.10.2."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
