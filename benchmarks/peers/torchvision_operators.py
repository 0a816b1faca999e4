"""Operators that torchvision declares only beside the build of torch that it was made for.

MosaicML Streaming imports torchvision, and calls none of them. PyPI has torchvision for CUDA alone.
"""

from __future__ import annotations

import torch

if not hasattr(torch.ops.torchvision, "nms"):
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    """Declarations last as long as this."""

    for _name in ("nms", "qnms"):
        LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
