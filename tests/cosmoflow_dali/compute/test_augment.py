"""The 48 symmetries of the cube."""

from __future__ import annotations

import numpy as np
import torch

from cosmoflow_dali.compute import augment


def test_symmetries_are_those_of_the_cube() -> None:
    volume = torch.arange(3 * 27.0).reshape(1, 3, 3, 3, 3)
    images = {tuple(augment.apply(volume, number).flatten().tolist()) for number in range(48)}
    assert len(images) == 48
    # Neighbours remain neighbours, and the centre remains the centre.
    for number in range(48):
        turned = augment.apply(volume, number)[0, 0].flatten().tolist()
        a, b, c = (np.array(np.unravel_index(turned.index(value), (3, 3, 3))) for value in (0.0, 1.0, 13.0))
        assert np.abs(a - b).sum() == 1 and (c == 1).all()


def test_channels_and_memory_format_are_preserved() -> None:
    volume = torch.randn(2, 4, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    for number in range(48):
        turned = augment.apply(volume, number)
        assert turned.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(turned.sum(dim=(2, 3, 4)), volume.sum(dim=(2, 3, 4)), rtol=1e-4, atol=1e-3)


def test_seed_and_position_determine_the_symmetry() -> None:
    drawn = [augment.draw(1, 0, step) for step in range(2000)]
    assert set(drawn) == set(range(48))
    assert drawn == [augment.draw(1, 0, step) for step in range(2000)]
    assert drawn != [augment.draw(1, 1, step) for step in range(2000)]
