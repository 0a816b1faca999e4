"""Draws from the posteriors of samples: statistics, and the files that hold them.

All are in the units of `PARAMETERS`, and within the prior's box.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, repeat
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from cosmoflow_dali.posterior.fitted import Features, FittedPosteriors, join_features
from cosmoflow_dali.posterior.flow import FlowPosterior
from cosmoflow_dali.reporting.read_features import Network, describe
from pipelines.dataset.dataset import SampleDataset
from pipelines.errors import AccessError, DataError, reading, writing
from pipelines.filesystem import is_present
from pipelines.io import TEMPORARY_SUFFIX
from pipelines.loading.transforms import check_input
from pipelines.output import write_output
from pipelines.plan import derive_seed
from pipelines.sample import PARAMETERS, to_physical
from pipelines.storage.location import Location

QUANTILES = (2.5, 16.0, 50.0, 84.0, 97.5)
"""Quantiles of `Draws.statistics`, in percent."""

SUFFIXES = (".npz", ".h5")
"""Suffixes of files of draws."""

_NAMES = [parameter.name for parameter in PARAMETERS]
_PAIRS = list(combinations(range(len(PARAMETERS)), 2))
_LATEX = {"Omega_m": r"\Omega_m", "sigma_8": r"\sigma_8", "n_s": "n_s", "H_0": "H_0"}
_BOX = to_physical([[-1.0] * len(PARAMETERS), [1.0] * len(PARAMETERS)])
_LOG_VOLUME = float(np.log((_BOX[1] - _BOX[0]) / 2).sum())
"""Logarithm of a volume in physical units for a volume of 1 in units of the target."""

# The nearest float32 numbers further inside: a bound that is rounded may lie outside.
_LOW, _HIGH = np.nextafter(_BOX.astype(np.float32), _BOX.mean(axis=0).astype(np.float32))

STATISTICS = [
    *(
        f"{name}_{statistic}"
        for name in _NAMES
        for statistic in ("mean", "std", *(f"q{percent:g}" for percent in QUANTILES))
    ),
    *(f"cov_{_NAMES[first]}_{_NAMES[second]}" for first, second in _PAIRS),
]
"""Titles of `Draws.statistics`."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Draws from the posterior of one sample.

    Attributes:
        path: File of the sample, or SHARD/MEMBER.
        sample_id: Name of the sample, which is the same in every format.
        values: (draws, 4) float32.
        log_densities: Log-density of the posterior at each of them, (draws,), in nats per product of the
            parameters' units; None if it was not asked for.
    """

    path: Location
    sample_id: str
    values: npt.NDArray[np.float32]
    log_densities: npt.NDArray[np.float64] | None

    def statistics(self) -> list[str]:
        """Return the numbers of a line of a CSV file, in the order of `STATISTICS`."""
        values = self.values.astype(np.float64)
        covariance = np.cov(values.T)
        columns = [values.mean(axis=0), np.sqrt(np.diag(covariance))]
        columns += list(np.quantile(values, np.divide(QUANTILES, 100), axis=0))
        numbers = [*np.transpose(columns).flat, *(covariance[pair] for pair in _PAIRS)]
        return [f"{number:.7g}" for number in numbers]


def draw_posteriors(
    fitted: FittedPosteriors,
    network: Network,
    samples: Sequence[tuple[SampleDataset, int]],
    *,
    draws: int,
    seed: int,
    densities: bool,
) -> list[Draws]:
    """Draw from the best posterior of each of `samples`, whose targets need not be known.

    The draws depend on `seed` and on the sample's name and counts, and no more than by the rounding of
    float32 on other samples.

    Args:
        samples: Data sets, and indices in them.
        draws: Number of draws from each posterior.
        seed: Seed of the draws.
        densities: Compute log-densities as well.

    Raises:
        DataError: A sample cannot be read, or an output of the network is not finite.
    """

    def describe_one(dataset: SampleDataset, index: int) -> Features:
        sample = dataset.read(index)
        check_input(dataset.path(index), sample.counts, apply_log=network.apply_log)
        return describe(dataset, {index: sample}, network)

    features = join_features([describe_one(*sample) for sample in samples])
    posterior, numbers = fitted.conditioned(fitted.best, features)
    assert isinstance(posterior, FlowPosterior)
    seeds = [derive_seed(seed, "draws", sample_id) for sample_id in features.ids]
    targets = posterior.sample_each(numbers, draws, seeds)
    values = np.clip(to_physical(targets).astype(np.float32), _LOW, _HIGH)
    log_densities: Iterable[npt.NDArray[np.float64] | None] = repeat(None)
    if densities:
        every = posterior.log_density(numbers.repeat(draws, axis=0), targets.reshape(-1, len(PARAMETERS)))
        log_densities = every.reshape(-1, draws) - _LOG_VOLUME
    paths = [dataset.path(index) for dataset, index in samples]
    return list(map(Draws, paths, features.ids, values, log_densities))


@contextmanager
def collect_draws(path: Path) -> Iterator[Callable[[Draws], None]]:
    """Write the draws given to the yielded function to the file `path` once the body has ended.

    It is an .npz archive or an HDF5 file, by its suffix, with the arrays `draws` (n, draws, 4) float32,
    `path` and `sample_id` (n,), `parameter` and `unit` (4,). Until then the draws are in a temporary file in
    the same folder, not in memory.
    """
    paths, names = list[str](), list[str]()
    with writing(path):
        spool = tempfile.TemporaryFile(dir=path.resolve().parent)  # noqa: SIM115 (closed below)

    def add(sample: Draws) -> None:
        paths.append(str(sample.path))
        names.append(sample.sample_id)
        with writing(path):
            spool.write(sample.values.data)

    with spool:
        yield add
        with writing(path):
            spool.flush()
        text = {
            "path": paths,
            "sample_id": names,
            "parameter": _NAMES,
            "unit": [parameter.unit for parameter in PARAMETERS],
        }
        draws = np.memmap(spool, np.float32, "r").reshape(len(paths), -1, len(PARAMETERS))

        def write(file: BinaryIO) -> None:
            if path.suffix == ".npz":
                arrays: dict[str, Any] = {key: np.array(value) for key, value in text.items()}
                np.savez(file, draws=draws, **arrays)
                return
            with h5py.File(file, "w") as archive:
                archive["draws"] = draws
                for key, value in text.items():
                    # Names that are not valid UTF-8 are written as they are.
                    encoded = [os.fsencode(each) for each in value]
                    archive.create_dataset(key, data=encoded, dtype=h5py.string_dtype())

        write_output(path, write)


@contextmanager
def write_chains(folder: Path) -> Iterator[Callable[[Draws], None]]:
    """Write a chain for each sample given to the yielded function into the new or empty `folder`.

    A sample NAME has the files of CosmoMC and GetDist: NAME_1.txt with a weight, the negative log-density and
    the parameters on each line; NAME.paramnames with names and LaTeX labels; NAME.ranges with the prior's
    box. The folder appears once the body has ended.

    Raises:
        DataError: There is something at `folder`, or two samples have one name.
    """
    place = folder.resolve()
    if is_present(place):
        with reading(folder):
            if not place.is_dir() or os.listdir(place):
                raise DataError(folder, "is not an empty folder", "name a new folder for the chains")
    temporary = place.with_name(f".{place.name}.{secrets.randbits(48)}{TEMPORARY_SUFFIX}")
    names = "".join(f"{name}\t{_LATEX[name]}\n" for name in _NAMES)
    ranges = "".join(
        f"{name}\t{low:.7g}\t{high:.7g}\n" for name, low, high in zip(_NAMES, *_BOX, strict=True)
    )

    def add(sample: Draws) -> None:
        assert sample.log_densities is not None
        # Not NAME.txt: with a sample A and a sample A_1, GetDist would take A_1.txt for a second chain of A.
        texts = {"_1.txt": format_chain(sample), ".paramnames": names, ".ranges": ranges}
        for suffix, text in texts.items():
            try:
                with open(temporary / f"{sample.sample_id}{suffix}", "x", encoding="ascii") as file:
                    file.write(text)
            except FileExistsError as error:
                fault = f"has the name of another sample, {sample.sample_id}, and so has its chain"
                raise DataError(sample.path, fault, "predict them in separate runs") from error
            except OSError as error:
                raise AccessError.writing(folder, error) from error

    with writing(folder):
        temporary.mkdir()
    try:
        yield add
        with writing(folder):
            temporary.replace(place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def format_chain(sample: Draws) -> str:
    """Return the lines of a chain: a weight of 1, the negative log-density, the parameters."""
    assert sample.log_densities is not None
    rows = np.column_stack([-sample.log_densities, sample.values])
    # One operation for all lines takes a tenth of the time of np.savetxt.
    return ("1" + " %.7g" * rows.shape[1] + "\n") * len(rows) % tuple(rows.ravel().tolist())
