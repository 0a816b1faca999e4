"""Evaluation of a network on a split."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cosmoflow_dali.training.evaluation import Evaluation, evaluate
from pipelines.dataset.open import open_folder
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice


class Means(nn.Module):
    """Returns the mean of each redshift."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(volume))
        return volume.mean((2, 3, 4))


def test_micro_batches_have_the_outputs_of_the_whole_batch(tiny: Path) -> None:
    found: list[Evaluation] = []
    for micro_batch, sizes in ((None, [4, 4]), (3, [3, 1] * 2), (2, [2] * 4)):
        loader = Loader(
            open_folder(tiny / "validation"),
            LoaderConfig(batch_size=4),
            rank_slice=RankSlice(),
            seed=0,
            shuffle=False,
            ragged="pad",
            device=torch.device("cpu"),
        )
        model = Means()
        with closing(loader):
            found.append(evaluate(model, loader, Session(World()), micro_batch=micro_batch))
        # Seven samples, and one that fills the last batch.
        assert model.sizes == sizes and found[-1].samples == 7
        np.testing.assert_allclose(found[-1].predictions, found[0].predictions, rtol=1e-6)
