"""How well a network does on a whole split: exact scores, whatever the number of ranks."""

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
    """The network's answers over a split, in its order, and what they should have been.

    index: (n,) int64, each sample's position in the split; all of them, but for the damaged ones.
    predictions, targets: (n, 4) float64, in units of the target.
    """

    index: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.float64]
    targets: npt.NDArray[np.float64]

    @property
    def samples(self) -> int:
        """How many samples were scored."""
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
        """The same for a network that always answers 0, the mean of the parameters' ranges."""
        return _named(np.abs(self.targets).mean(axis=0))

    @property
    def residual_rms(self) -> dict[str, float]:
        """Root mean square of prediction - target for each parameter: its standard error."""
        return _named(np.sqrt(np.square(self.predictions - self.targets).mean(axis=0)))

    def scores(self) -> dict[str, Any]:
        """The figures that logs and programs print."""
        return {
            "mae": self.mae,
            "mse": self.mse,
            "mae_per_parameter": self.mae_per_parameter,
            "samples": self.samples,
        }


def evaluate(model: nn.Module, loader: Loader, session: Session, *, epoch: int = 0) -> Evaluation:
    """Score `model` on the split that the ranks' loaders cover between them, padded, in `epoch`'s order.

    Each rank fills in the rows that it has seen and the sum over ranks completes the table, so a
    sample that fills up a last batch cannot count twice. UserError, on every rank, where an answer
    is no number, and it names the sample if that is why; or where no sample is sound.
    """
    was_training = model.training
    model.eval()
    table: torch.Tensor | None = None
    with torch.no_grad():
        loaded = session.with_stall_guard(loader.batches(epoch), "waiting for a validation sample")
        for batch in session.tag_rank_errors(loaded):
            if table is None:
                # Whether a sample was seen, what the network made of it, and its target.
                shape = loader.split.total, 3, len(PARAMETERS)
                table = torch.zeros(shape, dtype=torch.float64, device=batch.target.device)
            rows = np.flatnonzero(batch.index >= 0)
            if len(rows):
                place = torch.from_numpy(loader.split.global_indices(batch.index[rows]))
                table[place, 0] = 1.0
                table[place, 1] = model(batch.volume)[torch.from_numpy(rows)].double()
                table[place, 2] = batch.target[torch.from_numpy(rows)].double()
    model.train(was_training)
    assert table is not None, "every rank takes part in every evaluation step"
    seen, predictions, targets = session.sum(table).cpu().numpy().transpose(1, 0, 2)
    index = np.flatnonzero(seen[:, 0])
    if not index.size:
        raise DataError(loader.split.root, "holds no sound sample to score", "see preprocess.verify")
    bad = index[~np.isfinite(predictions[index]).all(axis=1)]
    if bad.size:
        own = np.arange(len(loader.split))
        session.run_on_all_ranks(
            lambda: loader.raise_if_damaged(own[np.isin(loader.split.global_indices(own), bad)])
        )
        raise UserError(
            f"the network's answer for {bad.size} of {loader.split.total} sound samples is not a number: "
            "its training has diverged; lower the learning rate"
        )
    return Evaluation(index, predictions[index], targets[index])


def _named(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {parameter.name: float(value) for parameter, value in zip(PARAMETERS, values, strict=True)}
