"""The task of converting one sample from a format to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.formats import FORMATS
from pipelines.manifest import Source
from pipelines.sample import Sample, SampleSpec
from preprocess.output import make_samples


@dataclass(frozen=True, slots=True)
class Conversion:
    """From the format `form` in the folder `source` to the format `to` in the folder `target`.

    size, channels: of the samples' shape, (size, size, size, channels).
    """

    source: str
    form: str
    size: int
    channels: int
    target: str
    to: str

    def __call__(self, job: tuple[str, Sequence[tuple[str, Any]]]) -> dict[str, Any]:
        """Convert the sample with the stem job[0]; see `make_samples` for job[1] and the answer."""
        stem, wanted = job
        source, form = Path(self.source), FORMATS[self.form]

        def samples() -> Iterator[tuple[str, Sample]]:
            yield stem, form.read(source / (stem + form.suffix), SampleSpec(self.size, self.channels))

        origin = Source.of(source / (stem + part) for part in form.parts)
        return make_samples(Path(self.target), self.to, origin, wanted, samples)
