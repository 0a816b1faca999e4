"""The part of every sample that a rank reads where ranks share samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.sample import SampleSpec


@dataclass(frozen=True, slots=True)
class Slab:
    """One of `count` equal parts of every sample, cut along D, between the next planes of its neighbours.

    Attributes:
        index: number of the part.
        count: number of parts; it divides the size of the samples.
        periodic: the planes beyond the ends of a sample are those of its other end instead of zeros.
    """

    index: int
    count: int
    periodic: bool

    def shape(self, spec: SampleSpec) -> tuple[int, int, int, int]:
        """Return the shape of what is read of a sample, (D / count + 2, H, W, C)."""
        return (spec.size // self.count + 2, *spec.shape[1:])

    def planes(self, size: int) -> tuple[slice, int]:
        """Return the planes of the slab that a sample has, and the number of the first of them in the sample.

        The slab's other planes are zeros. The sample's planes follow each other cyclically.
        """
        depth = size // self.count
        start, stop = 0, depth + 2
        if not self.periodic:
            start += self.index == 0
            stop -= self.index == self.count - 1
        return slice(start, stop), (self.index * depth - 1 + start) % size


def shape_to_read(spec: SampleSpec, slab: Slab | None) -> tuple[int, int, int, int]:
    """Return the shape of `slab` of a sample of `spec`, or of all of it without a slab."""
    return spec.shape if slab is None else slab.shape(spec)


def cyclic_runs(first: int, count: int, total: int) -> Iterator[range]:
    """Yield `count` of the numbers below `total`, from `first` on and cyclically, as consecutive runs."""
    while count:
        run = range(first, min(first + count, total))
        yield run
        first, count = 0, count - len(run)
