"""The networks by configuration."""

from __future__ import annotations

from typing import TypeAlias

from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig

ModelConfig: TypeAlias = ReferenceConfig | OpenConfig
Model: TypeAlias = CosmoFlow | OpenCosmoFlow


def build_model(config: ModelConfig, seed: int, checkpoint_blocks: int = 0) -> Model:
    """Return the network of `config` with initial weights drawn from `seed`.

    Args:
        checkpoint_blocks: Number of first blocks that keep their input alone; see `checkpointed`.
    """
    model = OpenCosmoFlow(config, seed) if isinstance(config, OpenConfig) else CosmoFlow(config, seed)
    model.checkpoint_blocks = checkpoint_blocks
    return model
