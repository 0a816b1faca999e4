"""The posteriors of a run, in the file posterior.pt beside its checkpoints."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import torch
from torch import nn

from cosmoflow_dali.posterior.fitted import FittedPosteriors
from cosmoflow_dali.training.checkpoint import read_state
from pipelines.errors import DataError
from pipelines.io import write_file

POSTERIOR = "posterior.pt"

_VERSION = 1
_REMEDY = "resume the run to fit them again"


def save_posteriors(folder: Path, fitted: FittedPosteriors, model: nn.Module) -> Path:
    """Write `fitted`, which belongs to the weights of `model`, into `folder`; return the file's path."""
    buffer, path = io.BytesIO(), folder / POSTERIOR
    torch.save({"posterior_version": _VERSION, "weights": _digest(model), **fitted.state()}, buffer)
    write_file(path, buffer.getbuffer())
    return path


def load_posteriors(weights: Path, model: nn.Module) -> FittedPosteriors:
    """Return the posteriors that lie beside the file `weights`, from which `model` was loaded.

    Raises:
        DataError: There are none, they are damaged, or they belong to other weights.
    """
    path = weights.parent / POSTERIOR
    if not path.is_file():
        remedy = "train with `posterior` in the configuration, or give the newest checkpoint of such a run"
        raise DataError(path, "is not a file", remedy)
    try:
        state = read_state(path)
    except DataError as error:
        raise DataError(path, error.fault, _REMEDY) from error
    if (version := state.pop("posterior_version", None)) != _VERSION:
        fault = "does not hold posteriors" if version is None else f"has posterior version {version}"
        raise DataError(path, fault, f"this program reads version {_VERSION}; {_REMEDY}")
    if state.pop("weights", None) != _digest(model):
        remedy = f"give the checkpoint of the end of the run, or {_REMEDY}"
        raise DataError(path, f"belongs to other weights than {weights.name}", remedy)
    return FittedPosteriors.from_state(state)


def _digest(model: nn.Module) -> str:
    """Return a digest of the weights and statistics of `model`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
