"""Who reads what, and when: the one place that orders samples and draws seeds.

The plan of an epoch is a pure function of (seed, epoch, number of samples, global batch). It is
laid out as step, then rank, and knows nothing of how many ranks will share it, of formats or of
readers: they are all fed the order that stands here, and a resume is the same plan from a later
place.
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


@dataclass(frozen=True, slots=True)
class RankSlice:
    """One reader's part of every step: the `index`-th of `count` equal parts."""

    index: int = 0
    count: int = 1

    def select(self, plan: Indices) -> Indices:
        """This shard's columns, (steps, B), of an epoch's `plan` (steps, count * B)."""
        batch = plan.shape[1] // self.count
        return plan[:, self.index * batch : (self.index + 1) * batch]


def derive_seed(seed: int, *words: int | str) -> int:
    """A seed below 2**63 for the random stream that `words` name, of a run with `seed`.

    Streams with different words are independent, on every platform alike: the seed is the head of
    a BLAKE2b hash.
    """
    text = "\0".join(map(str, (seed, *words))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def permutation(samples: int, seed: int, *words: int | str) -> Indices:
    """The numbers below `samples` in the order that `seed` and `words` draw (numpy's Philox generator)."""
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
    """The sample that each place of each step of an epoch reads: (steps, global_batch) int64.

    Shard r of n takes columns r * B to (r + 1) * B of every row, with B = global_batch / n. With
    `shuffle` the order is a new permutation of all samples each epoch; without it, file order. Where
    the samples do not fill the last step, "drop" leaves that step out, and "pad" fills it up with -1
    after its samples, so that every sample is there once. With `steps` there are that many rows:
    fewer than the samples would fill, or some more of -1.

    UserError where "drop" would leave nothing.
    """
    if ragged == "drop" and samples < global_batch:
        raise UserError(
            f"{samples} training samples do not fill one step of {global_batch} (batch size times ranks): "
            "lower the batch size, start fewer ranks or add samples"
        )
    order = permutation(samples, seed, "shuffle", epoch) if shuffle else np.arange(samples, dtype=np.int64)
    over = samples % global_batch
    if over and ragged == "drop":
        order = order[:-over]
    elif over:
        order = np.concatenate([order, np.full(global_batch - over, -1, dtype=np.int64)])
    rows = order.reshape(-1, global_batch)
    if steps is None:
        return rows
    more = np.full((max(0, steps - len(rows)), global_batch), -1, dtype=np.int64)
    return np.concatenate([rows[:steps], more])
