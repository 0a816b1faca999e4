"""Samples by index, and what to do about one that is damaged."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pipelines.dataset import Split
from pipelines.errors import DataError
from pipelines.formats import Payload
from pipelines.sample import Sample

OnBadSample: TypeAlias = Literal["fail", "skip"]

_IN_A_ROW = 16
"""Damaged samples one behind the other that are passed over; more are no accident."""


class Reader:
    """Reads samples of `split`.

    on_bad_sample: "fail" raises the DataError of a sample that is damaged or not there; "skip"
        passes it over and remembers. To notice every fault before a sample is used, "skip" reads
        the counts whole on the host, where "fail" leaves some of the checks to the pipeline.
    skipped: the fault of each sample passed over so far, by its file's path.
    """

    def __init__(self, split: Split, on_bad_sample: OnBadSample = "fail") -> None:
        self.split = split
        self.skipped: dict[str, str] = {}
        self._skips = on_bad_sample == "skip"

    def sample(self, index: int) -> Sample | None:
        """Sample `index`; None where it is passed over."""
        try:
            return self.split.read(index)
        except DataError as error:
            if not self._skips:
                raise
            self.skipped[str(self.split.path(index))] = str(error)
            return None

    def payload(self, index: int) -> tuple[int, Payload]:
        """Sample `index` for DALI, or where it is passed over the next sound one: which, and its payload.

        DataError where too many in a row are damaged.
        """
        if not self._skips:
            return index, self.split.format.payload(self.split.path(index), self.split.spec)
        for step in range(min(_IN_A_ROW, len(self.split))):
            candidate = (index + step) % len(self.split)
            sample = self.sample(candidate)
            if sample is not None:
                return candidate, Payload(sample.counts, sample.target)
        raise DataError(
            self.split.path(index),
            f"and the {_IN_A_ROW - 1} samples behind it are damaged",
            "see what has become of the folder: python -m preprocess.verify",
        )
