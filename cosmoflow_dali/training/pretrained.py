"""Load a trained network from a checkpoint or from the reference's Keras weights."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosmoflow_dali.config import resolve
from cosmoflow_dali.models.build import Model, build_model
from cosmoflow_dali.models.keras_weights import from_reference_weights
from cosmoflow_dali.training.checkpoint import Checkpoint
from pipelines.errors import DataError, UserError
from pipelines.filesystem import open_regular
from pipelines.formats.signatures import recognize_file
from pipelines.sample import REDSHIFTS, SampleSpec

_REASON_LENGTH = 200
"""Characters of torch's message that are shown, at most: it may list every weight."""

_REMEDY = "give reference weights or a checkpoint"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A trained network in evaluation mode.

    Args:
        path: File of the weights.
        model: The network.
        size: Edge of its samples in voxels.
        apply_log: Its input is log(count + 1); otherwise count / mean.
        residual_rms: Standard error of each parameter on the run's validation split, in units of the
            target; None if these weights were not evaluated.
    """

    path: Path
    model: Model
    size: int
    apply_log: bool
    residual_rms: dict[str, float] | None = None

    def check_spec(self, path: str | os.PathLike[str], spec: SampleSpec) -> None:
        """Raise DataError unless the network takes the samples at `path`, which are of `spec`."""
        if spec.size != self.size:
            remedy = f"{self.path} takes samples of {self.size} voxels"
            raise DataError(path, f"has a size of {spec.size} voxels", remedy)
        if spec.channels != len(REDSHIFTS):
            remedy = f"{self.path} takes samples at {len(REDSHIFTS)} redshifts"
            raise DataError(path, f"has {spec.channels} redshifts", remedy)


def load_model(path: Path) -> LoadedModel:
    """Load the network in `path`: a checkpoint (.pt), or an .npz of Keras weights.

    An .npz has the arrays `conv0/kernel`, ..., optionally with the prefix `w/`.

    Raises:
        DataError: The file is missing, damaged or of another kind.
    """
    if path.suffix == ".npz":
        return _load_npz(path)
    checkpoint = Checkpoint.load(path)
    config = resolve(checkpoint.config)
    model = build_model(config.model, checkpoint.seed)
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        # The first line names the class.
        reason = textwrap.shorten(str(error).splitlines()[-1], _REASON_LENGTH)
        fault = f"holds weights of another network than its configuration describes ({reason})"
        raise DataError(path, fault, "give a checkpoint as the run wrote it") from error
    # Within an epoch, the newest scores are those of older weights.
    scores = checkpoint.scores if checkpoint.position.samples == 0 else None
    rms = scores["residual_rms"] if scores else None
    return LoadedModel(path, model.eval(), config.model.size, config.loader.apply_log, rms)


def _load_npz(path: Path) -> LoadedModel:
    try:
        with open(open_regular(path), "rb") as file, np.load(file, allow_pickle=False) as archive:
            prefix = "w/" if any(name.startswith("w/") for name in archive.files) else ""
            weights = {
                name.removeprefix(prefix): archive[name]
                for name in archive.files
                if name.startswith(prefix) and name.endswith(("/kernel", "/bias"))
            }
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile raise many types for a damaged file or one of another kind
        kind = recognize_file(path)
        reason = f"it holds {kind}" if kind and kind != "a zip archive" else error
        raise DataError(path, f"is not a readable .npz file ({reason})", _REMEDY) from error
    try:
        model = from_reference_weights(weights)
    except (UserError, ValueError) as error:  # ValueError: an array of text
        raise DataError(path, f"has no weights of the reference network ({error})", _REMEDY) from error
    return LoadedModel(path, model.eval(), model.config.size, apply_log=True)
