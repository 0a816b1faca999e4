"""A trained network from a file: a checkpoint of ours or the reference's weights."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from cosmoflow_dali.config import resolve
from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.models.keras_weights import from_reference_weights
from cosmoflow_dali.training.checkpoint import Checkpoint
from pipelines.errors import DataError


@dataclass(frozen=True, slots=True)
class Trained:
    """A network with its weights, in evaluation mode, and what is known about it.

    size: edge of the samples that it takes, in voxels.
    apply_log: whether it wants log(count + 1) or count / mean.
    residual_rms: each parameter's standard error on its run's validation split, in units of the
        target; None where these very weights were not evaluated.
    """

    model: nn.Module
    size: int
    apply_log: bool
    residual_rms: dict[str, float] | None


def load_trained(path: Path) -> Trained:
    """The network in `path`: a checkpoint (.pt), or an .npz of Keras weights.

    An .npz holds `conv0/kernel`, ..., or the same behind `w/`. DataError names what does not fit.
    """
    if path.suffix == ".npz":
        return _from_npz(path)
    checkpoint = Checkpoint.load(path)
    config = resolve(checkpoint.config)
    model = build_model(config.model, checkpoint.seed)
    model.load_state_dict(checkpoint.model)
    # Within an epoch, the newest scores are those of older weights.
    scores = checkpoint.scores if checkpoint.position.samples == 0 else None
    rms = scores["residual_rms"] if scores else None
    return Trained(model.eval(), config.model.size, config.loader.apply_log, rms)


def _from_npz(path: Path) -> Trained:
    try:
        with np.load(path, allow_pickle=False) as archive:
            prefix = "w/" if any(name.startswith("w/") for name in archive.files) else ""
            kinds = ("/kernel", "/bias")
            weights = {
                name.removeprefix(prefix): archive[name]
                for name in archive.files
                if name.startswith(prefix) and name.endswith(kinds)
            }
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            path, f"is no readable .npz ({error})", "give reference weights or a checkpoint"
        ) from error
    model = from_reference_weights(weights)
    return Trained(model.eval(), model.config.size, apply_log=True, residual_rms=None)
