"""Predict cosmological parameters from volumes: `python -m cosmoflow_dali.predict --weights W PATH ...`.

A PATH is a sample in any format, a shard of packed samples, a folder of samples, one that holds
splits, or a pattern such as 'DIR/*.tfrecord' or 'DIR/**/*.tar'. Labels are not needed and not read.

Writes CSV: one line per sample with the four parameters in physical units, each followed by its
standard error. That is the root mean square residual on the validation split of the checkpoint's
run: the same for every sample, and valid only for universes drawn like those of that split. It is
empty for weights without a validation. The first column is the sample's file, or SHARD/MEMBER.

With --samples N, N draws from the posterior of each sample take the place of these columns: for each
parameter their mean, standard deviation (std) and quantiles (q2.5, ... in percent), and the covariances of
all pairs (cov_A_B). The weights are then the checkpoint of the end of a run that has fitted posteriors
(posterior.pt lies beside it).
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

import numpy as np
import torch

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.posterior.flow import one_thread_each
from cosmoflow_dali.reporting.draws import (
    STATISTICS,
    SUFFIXES,
    Draws,
    collect_draws,
    draw_posteriors,
    write_chains,
)
from cosmoflow_dali.reporting.read_features import Network
from cosmoflow_dali.training.posterior_file import POSTERIOR, load_posteriors
from cosmoflow_dali.training.pretrained import LoadedModel, load_model
from pipelines.console import check_output
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import SAMPLE_SUFFIXES, open_path
from pipelines.distributed.cli import OneLineParser, local_path, location, report_errors
from pipelines.distributed.world import World, available_cores
from pipelines.errors import DataError
from pipelines.filesystem import find_files, refuse_input
from pipelines.loading.transforms import check_input, transform
from pipelines.output import write_output
from pipelines.sample import HALF_RANGE, PARAMETERS, to_physical
from pipelines.storage.location import Location

HEADER = ["file"] + [
    column
    for parameter in PARAMETERS
    for column in (parameter.name, f"{parameter.name}_standard_error_from_validation_residuals")
]

T = TypeVar("T")
R = TypeVar("R")

_SAMPLES_AT_ONCE, _DRAWS_AT_ONCE = 16, 2**14
"""Most samples that a thread draws for together, and most draws unless those of one sample are more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    world = World()
    with report_errors(world), ExitStack() as stack:
        arguments = _parse(argv)
        paths, output = list(_expand(arguments.paths)), arguments.output
        configure_torch(torch.device("cpu"), world.cores)
        loaded = load_model(arguments.weights)
        outputs = [path for path in (output, arguments.draws) if path is not None]
        for path in outputs:
            refuse_input(path, [arguments.weights, arguments.weights.parent / POSTERIOR])
        datasets = _open(loaded, paths, outputs)
        if arguments.samples is None:
            header, rows = HEADER, _predict_all(loaded, datasets)
        else:
            header, rows = ["file", *STATISTICS], stack.enter_context(_draw_all(arguments, loaded, datasets))
        if output is None:
            _write_rows(sys.stdout, header, rows)
            return 0

        def write(file: BinaryIO) -> None:
            # A name that is not valid UTF-8 is written as it is.
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            _write_rows(text, header, rows)
            text.detach()

        write_output(output, write)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; UserError for options that contradict each other."""
    parser = OneLineParser("cosmoflow_dali.predict", __doc__)
    parser.add_argument("--weights", type=Path, required=True, help="a checkpoint or a reference .npz")
    parser.add_argument(
        "--output", type=local_path, metavar="FILE", help="CSV file (default: standard output)"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="draw so often from each posterior")
    text = "file for all draws, .npz or HDF5 (.h5)"
    parser.add_argument("--draws", type=local_path, metavar="FILE", help=text)
    text = "new folder for a chain of each sample, as GetDist reads them"
    parser.add_argument("--chains", type=local_path, metavar="DIR", help=text)
    parser.add_argument("--seed", type=int, help="seed of the draws (default: 0)")
    text = "samples, shards or folders of them, in any format; paths, patterns or URLs"
    parser.add_argument("paths", nargs="+", type=location, metavar="PATH", help=text)
    arguments = parser.parse_args(argv)
    samples, draws = arguments.samples, arguments.draws
    if samples is None:
        for name in ("draws", "chains", "seed"):
            if getattr(arguments, name) is not None:
                parser.error(f"--{name} needs --samples")
    elif samples < 2:
        parser.error(f"--samples {samples}: must be at least 2")
    if arguments.seed is not None and arguments.seed < 0:
        parser.error(f"--seed {arguments.seed}: must be at least 0")
    if draws is not None and draws.suffix not in SUFFIXES:
        parser.error(f"--draws {draws}: the name must end with {' or '.join(SUFFIXES)}")
    if draws is not None and arguments.output is not None and draws.resolve() == arguments.output.resolve():
        parser.error(f"--draws {draws}: is also the CSV file")
    for name in ("output", "draws") if arguments.chains is not None else ():
        path = getattr(arguments, name)
        if path is not None and arguments.chains.resolve() in path.resolve().parents:
            parser.error(f"--{name} {path}: is in the folder of --chains")
    return arguments


def _expand(paths: Iterable[Location]) -> Iterator[Location]:
    """Yield `paths`, and in place of patterns what they match; DataError for one that does not exist."""
    for path in paths:
        if not isinstance(path, Path) or path.exists():
            yield path
        elif matched := _match(path):
            yield from matched
        else:
            raise DataError(path, "does not exist", "check the path")


def _match(pattern: Path) -> list[Path]:
    """Return the samples and folders that `pattern` matches, sorted; with the part `**`, samples alone."""
    # A folder that exists may have brackets in its name.
    base = next(folder for folder in pattern.parents if folder.exists())
    parts = pattern.relative_to(base).parts
    start = parts[: parts.index("**")] if "**" in parts else parts
    matched = [base / name for name in glob.glob(str(Path(*start)), root_dir=base)]
    if start == parts:
        # Labels, lists and the like lie beside samples.
        matched = [path for path in matched if path.is_dir() or path.name.endswith(SAMPLE_SUFFIXES)]
    else:
        # Unlike glob, find_files follows links that form a loop once.
        found = [find_files(folder, SAMPLE_SUFFIXES) for folder in matched]
        if errors := [error for _, below in found for error in below]:
            raise errors[0]
        rest = "/".join(parts[len(start) + 1 :]) or "*"
        matched = [path for paths, _ in found for path in paths if path.match(rest)]
    return sorted(matched)


def _open(loaded: LoadedModel, paths: Iterable[Location], outputs: Sequence[Path]) -> Iterator[SampleDataset]:
    """Open the samples at `paths`, one after the other; DataError for what must not be predicted."""
    for path in paths:
        for dataset in open_path(path, labeled=False):
            loaded.check_spec(path, dataset.spec)
            for output in outputs:
                refuse_input(output, dataset.all_files())
            yield dataset


def _write_rows(file: TextIO, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write the CSV file, and flush it after the line of each sample."""
    writer, pending = csv.writer(file), [header]
    for row in rows:
        writer.writerows([*pending, row])
        file.flush()
        check_output()
        pending = []


@contextmanager
def _draw_all(
    arguments: argparse.Namespace, loaded: LoadedModel, datasets: Iterable[SampleDataset]
) -> Iterator[Iterator[list[str]]]:
    """Yield the lines of the CSV file; write the other files of draws once the body has ended."""
    fitted, network = load_posteriors(loaded.path, loaded.model), Network(loaded.model, loaded.apply_log)

    def draw(samples: list[tuple[SampleDataset, int]]) -> list[Draws]:
        return draw_posteriors(
            fitted,
            network,
            samples,
            draws=arguments.samples,
            seed=arguments.seed or 0,
            densities=arguments.chains is not None,
        )

    with ExitStack() as stack:
        writers = []
        if arguments.draws is not None:
            writers.append(stack.enter_context(collect_draws(arguments.draws)))
        if arguments.chains is not None:
            writers.append(stack.enter_context(write_chains(arguments.chains)))
        # A sample's draws then do not depend on the number of cores.
        stack.enter_context(one_thread_each())
        pool = stack.enter_context(ThreadPoolExecutor(available_cores()))

        def rows() -> Iterator[list[str]]:
            samples = ((dataset, index) for dataset in datasets for index in range(len(dataset)))
            size = max(1, min(_SAMPLES_AT_ONCE, _DRAWS_AT_ONCE // arguments.samples))
            for some in _map_ahead(pool, draw, iter(lambda: list(islice(samples, size)), [])):
                for drawn in some:
                    for write in writers:
                        write(drawn)
                    yield [str(drawn.path), *drawn.statistics()]

        yield rows()


def _map_ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `function` of each of `items`, in order, while the threads work on the next few."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > available_cores():
            yield pending.popleft().result()
    for future in pending:
        yield future.result()


def _predict_all(loaded: LoadedModel, datasets: Iterable[SampleDataset]) -> Iterator[list[str]]:
    """Yield the lines of the CSV file."""
    for dataset in datasets:
        for index in range(len(dataset)):
            yield _predict(loaded, dataset, index)


def _predict(loaded: LoadedModel, dataset: SampleDataset, index: int) -> list[str]:
    """Return the line of the CSV file for sample `index`."""
    path, counts = dataset.path(index), dataset.read(index).counts
    check_input(path, counts, apply_log=loaded.apply_log)
    volume = torch.from_numpy(transform(counts, apply_log=loaded.apply_log))
    with torch.inference_mode():
        target = loaded.model(volume.permute(3, 0, 1, 2)[None])[0].numpy()
    if not np.isfinite(target).all():
        raise DataError(path, "the network's output is not finite", f"check the training of {loaded.path}")
    row = [str(path)]
    for parameter, value in zip(PARAMETERS, to_physical(target), strict=True):
        rms = loaded.residual_rms
        error = f"{parameter.mean * HALF_RANGE * rms[parameter.name]:.7g}" if rms else ""
        row += [f"{value:.7g}", error]
    return row


if __name__ == "__main__":
    sys.exit(main())
