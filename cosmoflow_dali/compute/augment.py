"""Symmetries of a volume, which leave the cosmology unchanged; one is drawn for each global batch.

Which of them hold is a property of the data, so the configuration states it:

- `true`: the 48 rotations and reflections of the cube, for data whose voxels have no preferred direction.
- `periodic`: the 6 permutations of the axes and all periodic shifts, for whole simulated boxes. Their voxels
  lie a quarter off the lattice on which the particles start, along every axis alike; in a mirror image they
  would lie a quarter off to the other side.
"""

from __future__ import annotations

from itertools import permutations, product
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from pipelines.plan import derive_seed

Symmetries: TypeAlias = Literal[False, True, "periodic"]

_AXES = tuple(permutations((2, 3, 4)))
"""Orders of the axes D, H and W of a volume (B, C, D, H, W)."""

CUBE = tuple(product(_AXES, product((False, True), repeat=3)))
"""Pairs of an order of the axes and, for each of the three, True if it is then mirrored."""


class Symmetry(NamedTuple):
    """A symmetry of volumes.

    Attributes:
        axes: Order of the axes.
        mirrored: For each of the three, True if it is then mirrored.
        shifts: Voxels by which each is then shifted.
    """

    axes: tuple[int, ...]
    mirrored: tuple[bool, ...] = (False, False, False)
    shifts: tuple[int, ...] = (0, 0, 0)

    @staticmethod
    def numbered(kind: Symmetries, number: int, size: int) -> Symmetry:
        """Return symmetry `number`, modulo their number, of volumes of `size` voxels along each edge."""
        if kind != "periodic":
            return Symmetry(*CUBE[number % len(CUBE)])
        number, order = divmod(number, len(_AXES))
        return Symmetry(_AXES[order], shifts=tuple(number // size**axis % size for axis in range(3)))

    def source(self, size: int) -> torch.Tensor:
        """Return the plane along the first of `axes` that becomes each plane of the result, (size,) int64."""
        planes = (torch.arange(size) - self.shifts[0]) % size
        return size - 1 - planes if self.mirrored[0] else planes

    def apply(self, volume: torch.Tensor, *, along: tuple[int, ...] = (0, 1, 2)) -> torch.Tensor:
        """Apply the symmetry to `volume` (B, C, D, H, W); return channels_last_3d.

        Args:
            volume: To apply it to.
            along: Axes of the result, from 0, that are mirrored and shifted.
        """
        turned = volume.permute(0, 1, *self.axes)
        flipped = [axis + 2 for axis in along if self.mirrored[axis]]
        if flipped:
            turned = turned.flip(flipped)
        shifted = torch.empty_like(turned, memory_format=torch.channels_last_3d)
        # Along each axis, the two parts of a volume change places: eight blocks, each copied once.
        parts = []
        for axis, size in enumerate(turned.shape[2:]):
            shift = self.shifts[axis] if axis in along else 0
            moved = (slice(shift, None), slice(None, size - shift))
            wrapped = (slice(None, shift), slice(size - shift, None))
            parts.append((moved, wrapped) if shift else (moved,))
        for block in product(*parts):
            (to_d, from_d), (to_h, from_h), (to_w, from_w) = block
            shifted[:, :, to_d, to_h, to_w] = turned[:, :, from_d, from_h, from_w]
        return shifted


def draw(seed: int, epoch: int, step: int) -> int:
    """Return the number of the symmetry of the global batch at `step` of `epoch`, the same on all ranks."""
    return derive_seed(seed, "symmetry", epoch, step)


def apply(
    volume: torch.Tensor,
    kind: Symmetries,
    number: int,
    group: dist.ProcessGroup | None = None,
    *,
    periodic: bool = False,
) -> torch.Tensor:
    """Apply symmetry `number`, modulo their number.

    Args:
        volume: (B, C, D, H, W). With `group`, this rank's slab of it between one plane of each neighbour,
            (B, C, d + 2, H, W).
        kind: Symmetries of the data.
        number: Of the symmetry.
        group: Ranks that hold slabs of the volumes, in order; None for whole volumes.
        periodic: The planes beyond a volume's ends are those of the other end instead of zeros.

    Returns:
        The turned volume, or the slab of it, of the shape of `volume`; channels_last_3d.
    """
    symmetry = Symmetry.numbered(kind, number, volume.shape[-1])
    if group is None:
        return symmetry.apply(volume)
    return _apply_to_slabs(volume, symmetry, group, periodic=periodic)


def _apply_to_slabs(
    slab: torch.Tensor, symmetry: Symmetry, group: dist.ProcessGroup, *, periodic: bool
) -> torch.Tensor:
    """Apply `symmetry` to volumes whose slabs the ranks of `group` hold; see `apply`.

    The ranks exchange what is needed, at most all of their slabs. Reading the planes of another axis from the
    files instead would mean to read whole samples.
    """
    own, size = slab[:, :, 1:-1], slab.shape[-1]
    ranks, rank, depth = dist.get_world_size(group), dist.get_rank(group), own.shape[2]
    source = symmetry.source(size)
    # The planes of every rank's result: where they lie in it, and in the volumes.
    places = [torch.arange(depth + 2)] * ranks
    planes = [place + depth * each - 1 for each, place in enumerate(places)]
    if not periodic:
        places = [place[(plane >= 0) & (plane < size)] for place, plane in zip(places, planes, strict=True)]
        planes = [plane[(plane >= 0) & (plane < size)] for plane in planes]
    wanted = [source[plane % size] for plane in planes]
    if symmetry.axes[0] == 2:
        sent = [own[:, :, _moved(needed[needed // depth == rank] % depth, own.device)] for needed in wanted]
        owners = wanted[rank] // depth
        counts = [int((owners == each).sum()) for each in range(ranks)]
        shapes = [(*own.shape[:2], count, *own.shape[3:]) for count in counts]
        received = torch.cat(_exchange(sent, shapes, group), 2)
        # From the order of owners to that of the result.
        order = torch.argsort(torch.argsort(owners, stable=True))
        received = received[:, :, _moved(order, own.device)]
    else:
        axis = symmetry.axes[0]
        sent = [own.index_select(axis, _moved(needed, own.device)) for needed in wanted]
        shape = [*own.shape]
        shape[axis] = len(wanted[rank])
        received = torch.cat(_exchange(sent, [tuple(shape)] * ranks, group), 2)
    turned = symmetry.apply(received, along=(1, 2))
    if len(places[rank]) == depth + 2:
        return turned
    result = turned.new_zeros(*own.shape[:2], depth + 2, size, size)
    result = result.contiguous(memory_format=torch.channels_last_3d)
    first, last = places[rank][[0, -1]].tolist()
    result[:, :, first : last + 1] = turned
    return result


def _moved(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `index` on `device`. Indexing a GPU's tensor by one on the host would wait for the GPU."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index


def _exchange(
    sent: list[torch.Tensor], shapes: list[tuple[int, ...]], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Send a tensor to each rank of `group`; return those received, of `shapes`."""
    outgoing = torch.cat([tensor.reshape(-1) for tensor in sent])
    lengths = [torch.Size(shape).numel() for shape in shapes]
    incoming = outgoing.new_empty(sum(lengths))
    dist.all_to_all_single(incoming, outgoing, lengths, [tensor.numel() for tensor in sent], group)
    return [part.view(shape) for part, shape in zip(incoming.split(lengths), shapes, strict=True)]
