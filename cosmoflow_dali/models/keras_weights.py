"""The reference network with weights from Keras."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.errors import UserError


def from_reference_weights(mapping: Mapping[str, npt.ArrayLike]) -> CosmoFlow:
    """Return the network with the Keras weights `mapping`, without dropout.

    Depth, widths and size follow from the shapes.

    Args:
        mapping: conv0/kernel (3, 3, 3, in, out), conv0/bias (out,), ..., dense0/kernel (in, out), ...,
            dense2/bias (4,).

    Raises:
        UserError: A weight is missing, unexpected, or does not fit; the message names it.
    """
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in mapping.items()}
    blocks = max(1, sum(name.startswith("conv") and name.endswith("/kernel") for name in arrays))
    layers = [*(f"conv{block}" for block in range(blocks)), "dense0", "dense1", "dense2"]
    names = [f"{layer}/{part}" for layer in layers for part in ("kernel", "bias")]
    for name in names:
        if name not in arrays:
            raise UserError(f"missing weight {name}; found {', '.join(sorted(arrays)) or 'none'}")
        axes = 1 if name.endswith("/bias") else 5 if name.startswith("conv") else 2
        if arrays[name].ndim != axes or not arrays[name].size:
            raise UserError(f"weight {name} has shape {arrays[name].shape}; expected {axes} axes")
    if unexpected := sorted(arrays.keys() - set(names)):
        raise UserError(f"unexpected weight {unexpected[0]}; the network has {', '.join(names)}")
    model = CosmoFlow(_config(arrays, blocks))
    with torch.no_grad():
        for layer, module in zip(layers, (*model.convs, *model.denses), strict=True):
            for part, attribute in (("kernel", "weight"), ("bias", "bias")):
                parameter, array = module.get_parameter(attribute), arrays[f"{layer}/{part}"]
                value = torch.from_numpy(array)
                if value.ndim > 1:
                    # Keras: (..., in, out); torch: (out, in, ...).
                    value = value.movedim((-1, -2), (0, 1))
                if parameter.shape != value.shape:
                    raise UserError(
                        f"weight {layer}/{part} has shape {array.shape}; it does not fit the layer before"
                    )
                parameter.copy_(value)
    return model


def _config(arrays: Mapping[str, npt.NDArray[np.float32]], blocks: int) -> ReferenceConfig:
    """Derive the configuration from the last axes of the kernels."""
    filters = arrays["conv0/kernel"].shape[-1]
    features, *_ = arrays["dense0/kernel"].shape
    edge = round((features / (filters * 2 ** (blocks - 1))) ** (1 / 3))
    dense = tuple(int(arrays[f"dense{layer}/kernel"].shape[-1]) for layer in range(2))
    size = max(edge, 1) * 2**blocks
    return ReferenceConfig(size=size, blocks=blocks, filters=filters, dense=dense, dropout=0.0)
