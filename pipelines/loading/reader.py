"""Samples by index, and what to do about one that is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import MAX_CONSECUTIVE_BAD, DataError
from pipelines.formats.base import Payload
from pipelines.sample import Sample

OnBadSample: TypeAlias = Literal["fail", "skip"]

_Read = TypeVar("_Read")


class Reader:
    """Reads samples of `split`.

    on_bad_sample: "fail" raises the DataError of a sample that is damaged or not there; "skip"
        passes it over and remembers. To notice every fault before a sample is used, "skip" checks
        it whole on the host, where "fail" leaves some of the checks to the pipeline.
    direct_io: whether payloads are read past the page cache.
    skipped: the fault of each sample passed over so far, by its file's path.
    """

    def __init__(
        self, split: SampleDataset, on_bad_sample: OnBadSample = "fail", *, direct_io: bool = False
    ) -> None:
        self.split = split
        self.skipped: dict[str, str] = {}
        self._direct = direct_io
        self._skips = on_bad_sample == "skip"

    def sample(self, index: int) -> Sample | None:
        """Sample `index`; None where it is passed over."""
        return self._unless_damaged(index, self.split.read)

    def payload(self, index: int) -> tuple[int, Payload]:
        """Sample `index` for the pipeline, or where it is passed over the next sound one: which, and it.

        DataError where there is none in too many files in a row.
        """
        passed, files = 0, set[Path]()
        while passed < len(self.split):
            candidate = (index + passed) % len(self.split)
            files.add(self.split.files(candidate)[-1])
            if len(files) > MAX_CONSECUTIVE_BAD:
                break
            payload = self._unless_damaged(candidate, self._payload)
            if payload is not None:
                return candidate, payload
            passed += 1
        raise DataError(
            self.split.path(index),
            f"and the {passed - 1} samples behind it are damaged",
            "see what has become of the folder: python -m preprocess.verify",
        )

    def _payload(self, index: int) -> Payload:
        return self.split.payload(index, fully_validate=self._skips, direct=self._direct)

    def _unless_damaged(self, index: int, read: Callable[[int], _Read]) -> _Read | None:
        try:
            return read(index)
        except DataError as error:
            if not self._skips:
                raise
            self.skipped[str(self.split.path(index))] = str(error)
            return None
