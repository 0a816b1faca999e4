"""The task of converting samples from a format to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.dataset import Extents, Split
from pipelines.errors import AccessError, DataError
from pipelines.files import Written
from pipelines.formats import FORMATS
from pipelines.formats.packed import MEMBER
from pipelines.manifest import Source
from pipelines.packing import encode
from pipelines.sample import SampleSpec
from pipelines.shards import SHARD, write_shard
from preprocess.output import DamagedError, make_entries

Line = tuple[str, int, int]
"""A sample of the source: its name there, and where in a shard it starts and how long it is, or zeros."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """From the format `form` in the folder `source` to the format `to` in the folder `target`.

    size, channels: of the samples' shape, (size, size, size, channels).
    sharded: whether the samples of a job become one shard, or each a file of its own.
    """

    source: str
    form: str
    size: int
    channels: int
    target: str
    to: str
    sharded: bool

    def __call__(self, job: tuple[Sequence[Line], Sequence[tuple[str, Any]]]) -> dict[str, Any]:
        """Convert the samples job[0]; see `make_entries` for job[1] and the answer."""
        lines, wanted = job
        split, target = self._split(lines), Path(self.target)

        def samples() -> Iterator[tuple[str, Sequence[Written]]]:
            for index in range(len(split)):
                stem = split.stem(index)
                yield stem, FORMATS[self.to].write(target, stem, split.read(index))

        def shard() -> Iterator[tuple[str, Sequence[Written]]]:
            ((stem, _),) = wanted
            yield stem, write_shard(target / (stem + SHARD), _members(split))

        files = dict.fromkeys(path for index in range(len(split)) for path in split.files(index))
        return make_entries(target, Source.of(split.names, files), wanted, shard if self.sharded else samples)

    def _split(self, lines: Sequence[Line]) -> Split:
        names, offsets, lengths = zip(*lines, strict=True)
        extents = Extents(np.array(offsets), np.array(lengths)) if any(lengths) else None
        return Split(Path(self.source), self.form, names, SampleSpec(self.size, self.channels), extents)


def lines_of(split: Split) -> list[Line]:
    """The samples of `split` as a Conversion is told of them."""
    if not split.extents:
        return [(name, 0, 0) for name in split.names]
    places = zip(split.extents.offsets.tolist(), split.extents.lengths.tolist(), strict=True)
    return [(name, *place) for name, place in zip(split.names, places, strict=True)]


def _members(split: Split) -> Iterator[tuple[str, Iterator[bytes]]]:
    """The members of a shard of all of `split`; DamagedError after the last one if some are damaged."""
    faults = []
    for index in range(len(split)):
        try:
            sample = split.read(index)
        except AccessError:
            raise
        except DataError as error:
            faults.append(str(error))
        else:
            yield split.stem(index) + MEMBER, encode(sample)
    if faults:
        raise DamagedError(faults)
