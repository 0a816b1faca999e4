"""Model of the memory of a training step on a rank, by counting the tensors of its blocks.

At its peak a step holds what the forward pass of a block and of those before it has kept for the backward
pass, and what that block's backward pass works on. Beside this a rank needs its weights, their gradients and
the optimizer's numbers, the batches that the loader reads ahead, and the libraries' own work space, which is
unknown.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks.spatial_model import Cuts, Network, Part
from cosmoflow_dali.models.checkpointed import split_depth


class _Held(NamedTuple):
    """Outputs of a convolution that a block holds, in multiples of their number.

    Attributes:
        kept: From the forward to the backward pass.
        worked: In the backward pass, beside these.
    """

    kept: float
    worked: float


def _held(network: Network, width: int, *, gpu: bool) -> _Held:
    """Return what a block holds; pooling divides by 8."""
    if network.is_open:
        # Kept on a CPU: normalised and active values; on a GPU the outputs themselves, too.
        return _Held(3, 1 + 1 / 4) if gpu else _Held(2, 1 + 3 / 8)
    # Kept: the outputs and the pooled ones, on a GPU also an index of 8 bytes. The gradient of the outputs
    # takes their place on a CPU.
    return _Held(1 + 1 / width + 1 / 8, 1 + 1 / 8) if gpu else _Held(1 + 1 / 8, 5 / 8)


def peak_bytes(
    network: Network,
    cuts: Cuts = (1, 1, 1),
    *,
    samples: int = 1,
    width: int = 4,
    checkpoint_blocks: int = 0,
    gpu: bool = True,
) -> float:
    """Return the largest number of bytes of activations and their gradients in a step of a rank.

    Args:
        cuts: Parts of a sample; a rank of a group of S holds one of (S, 1, 1).
        samples: Samples of a batch, or of a micro batch.
        width: Bytes of a number of the activations.
        checkpoint_blocks: The setting of `compute`.
        gpu: Blocks as torch computes them on a GPU. Triton's kernels keep less.
    """
    held = _held(network, width, gpu=gpu)
    kept = peak = 0.0
    for number, part in enumerate(network.parts(cuts)):
        outputs = float(math.prod(part.extent) * part.block.filters)
        inputs = float(_padded(part, network) * part.block.inputs)
        # The first block's input belongs to the batch; the open network copies it between halos.
        copied = inputs if network.is_open or number else 0.0
        if number < checkpoint_blocks:
            share = _share(part, network)
            kept += copied
            worked = share * (sum(held) * outputs + inputs) + (2 * inputs if number else 0.0)
        else:
            kept += copied + held.kept * outputs
            worked = held.worked * outputs
        peak = max(peak, kept + worked)
    return peak * samples * width


def _padded(part: Part, network: Network) -> int:
    """Return the voxels of the input of `part` with its halos, and with periodic edges."""
    edges = [
        size + 2 * (network.is_open or cut > 1) for size, cut in zip(part.extent, part.cuts, strict=True)
    ]
    return math.prod(edges)


def _share(part: Part, network: Network) -> float:
    """Return the share of `part` that is computed at a time if it is checkpointed."""
    depth = part.extent[0]
    first, last = split_depth(depth)[0]
    # Without halos the reference network computes two planes more on either side.
    again = 0 if network.is_open or part.cuts[0] > 1 or last - first == depth else 4
    return min(1.0, (last - first + again) / depth)
