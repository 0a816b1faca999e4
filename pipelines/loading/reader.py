"""Reading of samples by index, and the policy for damaged ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import MAX_CONSECUTIVE_BAD, DataError
from pipelines.formats.packed.format import padding_payload
from pipelines.formats.payload import CountsPayload, Payload
from pipelines.loading.transforms import check_input
from pipelines.sample import PARAMETERS, Sample
from pipelines.slab import Slab, shape_to_read
from pipelines.storage.location import Location

OnBadSample: TypeAlias = Literal["fail", "skip"]

_Read = TypeVar("_Read")


class Reader:
    """Reader of the samples of `split`.

    Args:
        split: Samples to read.
        on_bad_sample: "fail" raises the DataError of a damaged or missing sample. "skip" records it and
            continues; to find every fault before a sample is used, samples are then fully validated on
            the host, where "fail" leaves part of the validation to the decoder.
        direct_io: Read payloads past the page cache.
        apply_log: See `LoaderConfig`. A sample without particles counts as damaged if it is False.
        slab: Part of every payload that is read; None for all of it.

    Attributes:
        skipped: Fault of each sample skipped so far, by the path of its file.
        slab: As given.
    """

    def __init__(
        self,
        split: SampleDataset,
        on_bad_sample: OnBadSample = "fail",
        *,
        direct_io: bool = False,
        apply_log: bool = True,
        slab: Slab | None = None,
    ) -> None:
        self.split = split
        self.skipped: dict[str, str] = {}
        self._skips = on_bad_sample == "skip"
        self._direct_io, self._apply_log, self.slab = direct_io, apply_log, slab

    def sample(self, index: int) -> Sample | None:
        """Return sample `index`; None if it is skipped."""
        return self._unless_damaged(index, self._read_sample)

    def payload(self, index: int, ahead: int = 0, split: SampleDataset | None = None) -> tuple[int, Payload]:
        """Return the index and payload of sample `index` or, if that is skipped, of the next valid one.

        Args:
            index: Sample to read; -1 for a padding payload.
            ahead: Number of samples from `index` on that another rank has skipped.
            split: The same samples, with some of them in memory.

        Raises:
            DataError: The samples of more than MAX_CONSECUTIVE_BAD consecutive files are damaged; that of
                the first.
        """
        if index < 0:
            return index, self._padding_payload
        total, files = len(self.split), set[Location]()
        read = functools.partial(self._read_payload, split=split or self.split)
        for tried in range(total + 1):
            candidate = (index + tried) % total
            files.add(self.split.files(candidate)[-1])
            if tried == total or len(files) > MAX_CONSECUTIVE_BAD:
                break
            payload = self._unless_damaged(candidate, read) if tried >= ahead else None
            if payload is not None:
                return candidate, payload
        try:
            payload = read(index)
        except DataError as error:
            fault = f"{error.fault} (unusable samples in a row: {tried})"
            raise DataError(error.path, fault, error.remedy) from error
        if ahead:
            fault = f"another rank cannot use its part of it (unusable samples in a row: {tried})"
            raise DataError(self.split.path(index), fault, "fix the files that the ranks have skipped")
        return index, payload

    @functools.cached_property
    def _padding_payload(self) -> Payload:
        """Payload of a row that only fills a batch: one particle in every voxel, which becomes finite input.

        It is not taken from the data set, because a partition may have no samples.
        """
        if self.split.sharded:
            return padding_payload(self.split.spec, self.slab)
        shape = shape_to_read(self.split.spec, self.slab)
        return CountsPayload(np.ones(shape, np.int16), np.zeros(len(PARAMETERS), np.float32))

    def _read_sample(self, index: int) -> Sample:
        sample = self.split.read(index)
        check_input(self.split.path(index), sample.counts, apply_log=self._apply_log)
        return sample

    def _read_payload(self, index: int, split: SampleDataset) -> Payload:
        payload = split.payload(index, slab=self.slab, fully_validate=self._skips, direct=self._direct_io)
        counts = payload.counts if isinstance(payload, CountsPayload) else payload.table
        # Mapped counts are not read yet. If they are all zero, the decoder makes NaN of them.
        if not (isinstance(payload, CountsPayload) and payload.mapped):
            check_input(self.split.path(index), counts, apply_log=self._apply_log)
        return payload

    def _unless_damaged(self, index: int, read: Callable[[int], _Read]) -> _Read | None:
        """Return `read(index)`; None if it raises DataError and damaged samples are skipped."""
        try:
            return read(index)
        except DataError as error:
            if not self._skips:
                raise
            self.skipped[str(self.split.path(index))] = str(error)
            return None
