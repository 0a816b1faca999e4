"""Slabs: the planes that a rank reads of every sample."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import slab_of, slabs

from pipelines.sample import SampleSpec
from pipelines.slab import Slab, cyclic_runs


@pytest.mark.parametrize("slab", slabs(1, 2, 4, 8), ids=str)
def test_planes_and_runs_are_those_of_the_padded_sample(slab: Slab) -> None:
    # One above its number in the sample, so that zeros are beyond its ends.
    counts = np.arange(1, 9)[:, None, None, None]
    expected = slab_of(counts, slab)
    assert slab.shape(SampleSpec(8, 1)) == (len(expected), 8, 8, 1)
    planes, first = slab.planes(8)
    found = np.zeros_like(expected)
    runs = [list(run) for run in cyclic_runs(first, len(found[planes]), 8)]
    found[planes, 0, 0, 0] = np.concatenate(runs) + 1
    np.testing.assert_array_equal(found, expected)


def test_runs_are_cyclic() -> None:
    assert [*cyclic_runs(3, 2, 8)] == [range(3, 5)]
    assert [*cyclic_runs(6, 5, 8)] == [range(6, 8), range(3)]
    assert [*cyclic_runs(1, 5, 2)] == [range(1, 2), range(2), range(2)]
