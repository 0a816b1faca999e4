"""The definition of a sample: particle counts at four redshifts, and four cosmological parameters.

It is that of the published set cosmoUniverse_2019_05_4parE_tf_v2
(https://portal.nersc.gov/project/m3363/).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError

if TYPE_CHECKING:
    import torch

SplitName: TypeAlias = Literal["train", "validation", "test"]

ALL_SPLITS: tuple[SplitName, ...] = get_args(SplitName)
"""Names of the splits, and of their folders in a data set."""

SPLITS: tuple[SplitName, ...] = ALL_SPLITS[:2]
"""The splits that a run reads. No training, early stopping or fit ever sees `test`."""

COUNT_LIMIT = 2**15
"""Upper bound of counts, which are int16."""

REDSHIFTS = (0.0, 0.5, 1.5, 3.0)
"""Redshift of each channel of a sample, in the order of its last axis."""


class Parameter(NamedTuple):
    """A cosmological parameter: its name, its mean over the data set, and its unit ("" for none)."""

    name: str
    mean: float
    unit: str


PARAMETERS = (
    Parameter("Omega_m", 0.3, ""),
    Parameter("sigma_8", 0.8, ""),
    Parameter("n_s", 0.96, ""),
    Parameter("H_0", 70.0, "km/s/Mpc"),
)
"""The target's components, in order."""

HALF_RANGE = 0.1
"""Parameters lie between mean * (1 - HALF_RANGE) and mean * (1 + HALF_RANGE)."""

_ROUNDING = 1e-6
"""Largest excess over 1 of a float32 target that means 1."""

_MEANS = np.array([parameter.mean for parameter in PARAMETERS])


def to_physical(target: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Convert targets (..., 4) to physical parameters (..., 4), in the units of `PARAMETERS`."""
    return _MEANS * (1.0 + HALF_RANGE * np.asarray(target, dtype=np.float64))


UNKNOWN_TARGET: npt.NDArray[np.float32] = np.full(len(PARAMETERS), np.nan, np.float32)
"""Target of a sample that was read for its counts alone."""


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """The shape of every sample of a data set: (size, size, size, channels)."""

    size: int
    channels: int = len(REDSHIFTS)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(D, H, W, C)."""
        return (self.size, self.size, self.size, self.channels)

    @property
    def bytes(self) -> int:
        """Length of one sample's counts in bytes."""
        return 2 * self.channels * self.size**3


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample on the host.

    Attributes:
        counts: (D, H, W, C) int16, particles in each voxel, at least 0.
        target: (4,) float32, `PARAMETERS` scaled to [-1, 1], or UNKNOWN_TARGET.
    """

    counts: npt.NDArray[np.int16]
    target: npt.NDArray[np.float32]


def check_counts(
    path: str | os.PathLike[str], counts: npt.NDArray[Any], spec: SampleSpec | None = None
) -> npt.NDArray[np.int16]:
    """Return `counts` if they are valid for a `Sample` (of `spec`); otherwise raise DataError for `path`."""
    shape = counts.shape
    if len(shape) != 4 or len(set(shape[:3])) != 1 or 0 in shape:
        raise DataError(path, f"counts have shape {shape}", "expected (size, size, size, redshifts)")
    if spec is not None and shape != spec.shape:
        raise DataError(path, f"counts have shape {shape}", f"the other samples have {spec.shape}: remove it")
    if counts.dtype != np.int16:
        raise DataError(path, f"counts are {counts.dtype}", "expected little-endian int16")
    check_not_negative(path, counts)
    return counts


def check_not_negative(path: str | os.PathLike[str], counts: npt.NDArray[np.int16]) -> None:
    """Raise DataError for `path` if one of `counts` is negative."""
    lowest = int(counts.min())
    if lowest < 0:
        raise DataError(path, f"a count is {lowest}", "counts start at 0: regenerate the file")


def check_target(path: str | os.PathLike[str], target: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return `target` if it is valid for a `Sample`; otherwise raise DataError for `path`."""
    if target.shape != (len(PARAMETERS),) or target.dtype != np.float32:
        fault = f"the target is {target.dtype} of shape {target.shape}"
        raise DataError(path, fault, f"expected float32 of shape ({len(PARAMETERS)},)")
    if not np.isfinite(target).all():
        raise DataError(path, f"the target is {target.tolist()}", "remove the sample or fix its target")
    return target


def is_in_range(target: npt.NDArray[np.float32]) -> bool:
    """Return whether all of `target` is within -1 to 1, up to the rounding of float32."""
    return bool((np.abs(target) <= 1 + _ROUNDING).all())


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a step, on the training device.

    The tensors belong to the loader and are valid until the next batch is requested.

    Attributes:
        volume: (B, C, D, H, W) float32 or float16, log(count + 1) or count / mean, in the
            channels_last_3d memory format (a view of the pipeline's NDHWC output, not a copy).
        target: (B, 4) float32.
        index: (B,) int64 on the host, each row's position in the split. -1 marks a row that must not
            count: padding, or the place of a damaged sample that was skipped.
    """

    volume: torch.Tensor
    target: torch.Tensor
    index: npt.NDArray[np.int64]
