"""The networks by configuration."""

from __future__ import annotations

from typing import TypeAlias

from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig

ModelConfig: TypeAlias = ReferenceConfig | OpenConfig


def build_model(config: ModelConfig, seed: int) -> CosmoFlow | OpenCosmoFlow:
    """Return the network of `config` with initial weights drawn from `seed`."""
    if isinstance(config, OpenConfig):
        return OpenCosmoFlow(config, seed)
    return CosmoFlow(config, seed)
