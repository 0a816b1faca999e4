"""The order of samples in an epoch, and all random seeds.

The plan of an epoch is a pure function of (seed, epoch, number of samples, global batch). Its rows
are steps, and each rank takes some columns. It is independent of the number of ranks and of the
format. All readers follow it, and a resumed run continues the same plan from a later step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError

Indices: TypeAlias = npt.NDArray[np.int64]
Ragged: TypeAlias = Literal["drop", "pad"]


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """One of `count` almost equal parts of a data set of `total` samples.

    Attributes:
        global_indices: positions of this part's samples in the data set, int64.
        seed: seed that drew the parts; None where each has every `count`-th sample.
    """

    global_indices: Indices
    count: int
    total: int
    seed: int | None


@dataclass(frozen=True, slots=True)
class RankSlice:
    """One rank's part of every step: the `index`-th of `count` equal parts."""

    index: int = 0
    count: int = 1

    def select(self, plan: Indices) -> Indices:
        """Return this rank's columns, (steps, B), of an epoch's `plan` (steps, count * B)."""
        batch = plan.shape[1] // self.count
        return plan[:, self.index * batch : (self.index + 1) * batch]


def derive_seed(seed: int, *words: int | str) -> int:
    """Return a seed below 2**63 for the random stream named `words`, in a run with `seed`.

    It is the beginning of a BLAKE2b hash: streams of different names are independent, and the same
    on every platform.
    """
    text = "\0".join(map(str, (seed, *words))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def permutation(samples: int, seed: int, *words: int | str) -> Indices:
    """Return the numbers below `samples` in random order, from a Philox generator; see `derive_seed`."""
    stream = np.random.Philox(key=derive_seed(seed, *words))
    return np.random.Generator(stream).permutation(np.arange(samples, dtype=np.int64))


def plan_epoch(
    samples: int,
    *,
    global_batch: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    ragged: Ragged,
    steps: int | None = None,
) -> Indices:
    """Return the sample indices of an epoch, (steps, global_batch) int64.

    Rank r of n takes columns r * B to (r + 1) * B of every row, with B = global_batch / n.

    Args:
        samples: number of samples.
        shuffle: draw a new permutation of all samples each epoch, instead of file order.
        ragged: if the samples do not fill the last step, "drop" omits that step, and "pad" fills it
            with -1, so that every sample is read once.
        steps: number of rows, cut off or filled with -1; the default is what the samples fill.

    Raises:
        UserError: "drop" would leave no step.
    """
    if ragged == "drop" and samples < global_batch:
        raise UserError(
            f"{samples} training samples do not fill one step of {global_batch} (batch size times ranks): "
            "lower the batch size, start fewer ranks or add samples"
        )
    order = permutation(samples, seed, "shuffle", epoch) if shuffle else np.arange(samples, dtype=np.int64)
    filled = samples // global_batch if ragged == "drop" else -(-samples // global_batch)
    rows = np.full((filled if steps is None else steps, global_batch), -1, dtype=np.int64)
    used = order[: filled * global_batch][: rows.size]
    rows.reshape(-1)[: len(used)] = used
    return rows
