"""Exact scores of a network on a whole split, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipelines.distributed.session import Session
from pipelines.errors import DataError, UserError
from pipelines.loading.loader import Loader
from pipelines.sample import PARAMETERS


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Predictions of a network for a split, in the order of the split.

    Args:
        index: Position of each sample in the split, (n,) int64; damaged samples are missing.
        predictions: Outputs of the network, (n, 4) float64, in units of the target.
        targets: True parameters, (n, 4) float64, in units of the target.
    """

    index: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.float64]
    targets: npt.NDArray[np.float64]

    @property
    def samples(self) -> int:
        """Number of samples scored."""
        return len(self.targets)

    @property
    def mae(self) -> float:
        """Mean absolute error over samples and parameters: the benchmark's quality metric."""
        return float(np.abs(self.predictions - self.targets).mean())

    @property
    def mse(self) -> float:
        """Mean squared error over samples and parameters."""
        return float(np.square(self.predictions - self.targets).mean())

    @property
    def mae_per_parameter(self) -> dict[str, float]:
        """Mean absolute error of each parameter."""
        return _named(np.abs(self.predictions - self.targets).mean(axis=0))

    @property
    def trivial_mae_per_parameter(self) -> dict[str, float]:
        """Mean absolute error of the output 0, the centre of each parameter's range."""
        return _named(np.abs(self.targets).mean(axis=0))

    @property
    def residual_rms(self) -> dict[str, float]:
        """Root mean square of prediction - target for each parameter: its standard error."""
        return _named(np.sqrt(np.square(self.predictions - self.targets).mean(axis=0)))

    def scores(self) -> dict[str, Any]:
        """Return the scores for logs and programs."""
        return {
            "mae": self.mae,
            "mse": self.mse,
            "mae_per_parameter": self.mae_per_parameter,
            "samples": self.samples,
        }


def evaluate(
    model: nn.Module, loader: Loader, session: Session, epoch: int = 0, micro_batch: int | None = None
) -> Evaluation:
    """Score `model` on the split that the loaders of all ranks cover together.

    Each rank fills in the rows of its samples, and the sum over ranks completes the table. A sample
    that pads a last batch therefore counts once. Of ranks that share samples, the first fills them in.

    Args:
        model: The network.
        loader: This rank's.
        session: The ranks.
        epoch: Epoch in whose order the samples are read.
        micro_batch: Samples of a batch processed at a time; all by default.

    Raises:
        UserError: On every rank, if an output is not finite or no sample is valid.
    """
    was_training = model.training
    model.eval()
    split = loader.split
    indices, truths = [], []
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        loaded = session.with_stall_guard(loader.batches(epoch), "waiting for a validation sample")
        for batch in session.tag_rank_errors(loaded):
            # Nothing here waits for the device.
            indices.append(batch.index)
            outputs += map(model, batch.volume.split(micro_batch or len(batch.volume)))
            truths.append(batch.target.clone())
    model.train(was_training)
    read = np.concatenate(indices)
    if loader.slab is not None and loader.slab.index:
        read = np.full_like(read, -1)
    real = torch.from_numpy(read >= 0)
    # For each sample: 1 if it was seen, the network's output, and the target.
    table = torch.zeros(split.total, 3, len(PARAMETERS), dtype=torch.float64)
    at = torch.from_numpy(split.global_indices(read[read >= 0]))
    table[at, 0] = 1.0
    table[at, 1] = torch.cat(outputs).cpu()[real].double()
    table[at, 2] = torch.cat(truths).cpu()[real].double()
    seen, predictions, targets = session.sum(table.to(outputs[0].device)).cpu().numpy().transpose(1, 0, 2)
    index = np.flatnonzero(seen[:, 0])
    if not index.size:
        raise DataError(split.root, "has no valid sample to score", "see preprocess.verify")
    bad = index[~np.isfinite(predictions[index]).all(axis=1)]
    if bad.size:
        own = np.arange(len(split))
        own_bad = own[np.isin(split.global_indices(own), bad)]
        device = table.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.dtype
        largest = torch.finfo(dtype).max
        session.run_on_all_ranks(lambda: loader.raise_if_damaged(own_bad, largest=largest))
        raise UserError(
            f"the network's output for {bad.size} of {split.total} valid samples is not finite: "
            "training has diverged; lower the learning rate"
        )
    return Evaluation(index, predictions[index], targets[index])


def _named(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {parameter.name: float(value) for parameter, value in zip(PARAMETERS, values, strict=True)}
