"""The networks by configuration."""

from __future__ import annotations

from typing import TypeAlias

from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig

ModelConfig: TypeAlias = ReferenceConfig | OpenConfig
Model: TypeAlias = CosmoFlow | OpenCosmoFlow


def build_model(config: ModelConfig, seed: int) -> Model:
    """Return the network of `config` with initial weights drawn from `seed`."""
    if isinstance(config, OpenConfig):
        return OpenCosmoFlow(config, seed)
    return CosmoFlow(config, seed)
