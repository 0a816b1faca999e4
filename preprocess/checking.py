"""The task of checking one sample against what is noted of it, and against what a sample is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
from isal import isal_zlib

from pipelines.errors import DataError
from pipelines.files import Written, read_file
from pipelines.formats import FORMATS
from pipelines.manifest import Entry, Part
from pipelines.sample import Sample, SampleSpec

_ROUNDING = 1e-6
"""How far beyond 1 a target in float32 may be and still mean 1."""


@dataclass(frozen=True, slots=True)
class Check:
    """Of samples (size, size, size, channels) in the format `form`, in `folder`."""

    folder: str
    form: str
    size: int
    channels: int

    def __call__(self, job: tuple[str, Any]) -> dict[str, Any]:
        """Check the sample with the stem job[0], and its files against job[1], an Entry or None.

        Answers {"faults": [[check, line], ...], "entry": what the files are now, "content": a word
        that two samples share if they are the same, "target": [...]}; all but the faults are None
        where a file cannot be read.
        """
        stem, noted = job
        folder, form = Path(self.folder), FORMATS[self.form]
        there = [part for part in (*form.extras, *form.parts) if (folder / (stem + part)).exists()]
        expected = Entry.from_json(noted) if noted is not None else None
        wanted = [part.suffix for part in expected.parts] if expected else form.parts
        missing = (folder / (stem + part) for part in wanted if part not in there)
        faults = [("files", f"{path}: is not there; convert it again") for path in missing]
        entry = sample = None
        try:
            entry = Entry.of(stem, [_checksummed(folder / (stem + part)) for part in there])
            if expected:
                faults += _against(folder, expected, entry)
            if not faults:
                sample = form.read(folder / (stem + form.suffix), SampleSpec(self.size, self.channels))
                faults += _of_target(folder / stem, sample)
        except DataError as error:
            faults.append(("content", str(error)))
        return {
            "faults": faults,
            "entry": entry.to_json() if entry else None,
            "content": _identity(sample) if sample else None,
            "target": sample.target.tolist() if sample else None,
        }


def _checksummed(path: Path) -> Written:
    content = read_file(path)
    return Written(path, len(content), crc32c.crc32c(content))


def _of_target(path: Path, sample: Sample) -> Iterator[tuple[str, str]]:
    if not (np.abs(sample.target) <= 1 + _ROUNDING).all():
        yield "targets", f"{path}: the target {sample.target.tolist()} is not within -1 to 1"


def _against(folder: Path, noted: Entry, found: Entry) -> Iterator[tuple[str, str]]:
    there: dict[str, Part] = {part.suffix: part for part in found.parts}
    for path, part in noted.files(folder):
        found_part = there.get(part.suffix, part)
        if found_part.bytes != part.bytes:
            yield "sizes", f"{path}: has {found_part.bytes} bytes; the manifest says {part.bytes}"
        elif found_part.crc32c != part.crc32c:
            yield "checksums", f"{path}: its CRC-32C is not the manifest's; remove it and convert again"


def _identity(sample: Sample) -> str:
    """Two CRCs of different polynomials, 64 bits together: few enough samples never share them by chance."""
    content = np.ascontiguousarray(sample.counts).data.cast("B")
    return f"{crc32c.crc32c(content):08x}{isal_zlib.crc32(content):08x}"
