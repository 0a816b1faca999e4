"""Read the numbers that posteriors are conditioned on: summaries of samples, and outputs of a network."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cosmoflow_dali.models.build import Model
from cosmoflow_dali.posterior.fitted import Features, join_features
from cosmoflow_dali.posterior.flow import one_thread_each
from cosmoflow_dali.posterior.summaries import compute_summaries
from pipelines.dataset.dataset import SampleDataset
from pipelines.distributed.session import Session
from pipelines.errors import DataError
from pipelines.loading.reader import Reader
from pipelines.loading.transforms import transform
from pipelines.sample import Sample, is_in_range
from pipelines.storage.parallel import map_ahead
from preprocess.conversion.progress import track

Array = npt.NDArray[np.float64]

_BATCH, _BATCH_VOXELS = 16, 2**19
"""Most samples, and most voxels unless one sample has more, that a thread reads, summarizes and passes
through the network together: 16 samples of 128^3 would need gigabytes for each thread."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network in evaluation mode.

    Attributes:
        model: The network, on its device.
        apply_log: Its input is log(count + 1); otherwise count / mean.
    """

    model: Model
    apply_log: bool

    @torch.inference_mode()
    def outputs(self, counts: Sequence[npt.NDArray[np.int16]]) -> Array:
        """Return the features (B, k) of samples with `counts` (n, n, n, C) each, computed in float32."""
        volumes = np.stack([transform(each, apply_log=self.apply_log) for each in counts])
        device = next(self.model.parameters()).device
        outputs = self.model.features(torch.from_numpy(volumes).permute(0, 4, 1, 2, 3).to(device))
        return outputs.double().cpu().numpy()


def read_features(
    reader: Reader,
    network: Network | None,
    session: Session,
    index: npt.NDArray[np.int64] | None = None,
) -> Features | None:
    """Return the features of the samples `index` of `reader`, of all by default; None except on rank 0.

    All ranks take part. Samples that `reader` skips are missing.

    Raises:
        DataError: On every rank, if a sample cannot be read and may not be skipped, a target is outside of
            the prior, an output of the network is not finite, or no sample is left.
    """
    split, world = reader.split, session.world
    chosen = np.arange(len(split)) if index is None else index
    own = np.array_split(chosen, world.size)[world.rank]
    size = max(1, min(_BATCH, _BATCH_VOXELS // split.spec.size**3))
    batches = [own[start : start + size].tolist() for start in range(0, len(own), size)]

    def read() -> list[Features]:
        with one_thread_each(), ThreadPoolExecutor(world.cores) as pool:
            running = pool.map(lambda batch: _read_batch(reader, network, batch), batches)
            guarded = session.with_stall_guard(running, "reading samples")
            label, shown = f"summarizing {split.root.name}", world.is_root
            parts = list(track(guarded, len(batches), label, f"x {size} samples", shown=shown))
        return [feature for part in parts for feature in part]

    parts = [part for some in session.gather_to_root(session.run_on_all_ranks(read)) for part in some]
    if not session.run_on_root(lambda: len(parts)):
        raise DataError(split.root, "has no valid sample", "see preprocess.verify")
    return join_features(parts) if parts else None


def _read_batch(reader: Reader, network: Network | None, batch: list[int]) -> list[Features]:
    """Return the features of the valid samples of `batch`, if there are any."""
    split = reader.split
    # Remote storage answers many requests in the time of one.
    read = map_ahead if split.storage.is_remote else map
    samples = zip(batch, read(reader.sample, batch), strict=True)
    found = {index: sample for index, sample in samples if sample is not None}
    for index, sample in found.items():
        if not is_in_range(sample.target):
            fault = f"the target {sample.target.tolist()} is outside of the prior, -1 to 1"
            raise DataError(split.path(index), fault, "see preprocess.verify")
    return [describe(split, found, network)] if found else []


def describe(split: SampleDataset, samples: dict[int, Sample], network: Network | None) -> Features:
    """Return the features of `samples` of `split`, by index; DataError if an output is not finite."""
    counts = [sample.counts for sample in samples.values()]
    outputs = None if network is None else network.outputs(counts)
    if outputs is not None and not np.isfinite(outputs).all():
        index = list(samples)[np.flatnonzero(~np.isfinite(outputs).all(axis=1))[0]]
        raise DataError(split.path(index), "the network's output is not finite", "check the training")
    return Features(
        tuple(split.sample_id(index) for index in samples),
        np.concatenate([compute_summaries(each[None]) for each in counts]),
        outputs,
        np.array([sample.target for sample in samples.values()], dtype=np.float64),
    )
