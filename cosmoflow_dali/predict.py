"""Predict cosmological parameters from volumes: `python -m cosmoflow_dali.predict --weights W PATH ...`.

A PATH is a sample in any format, a shard of packed samples, a folder of samples, one that holds
splits, or a pattern such as 'DIR/*.tfrecord' or 'DIR/**/*.tar'. Labels are not needed and not read.

Writes CSV: one line per sample with the four parameters in physical units, each followed by its
standard error. That is the root mean square residual on the validation split of the checkpoint's
run: the same for every sample, and valid only for universes drawn like those of that split. It is
empty for weights without a validation. The first column is the sample's file, or SHARD/MEMBER.
"""

from __future__ import annotations

import csv
import glob
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import torch

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.training.pretrained import LoadedModel, load_model
from pipelines.console import check_output
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.open import SAMPLE_SUFFIXES, open_path
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World
from pipelines.errors import DataError
from pipelines.filesystem import find_files, refuse_input
from pipelines.loading.transforms import check_input, transform
from pipelines.output import write_output
from pipelines.sample import HALF_RANGE, PARAMETERS, to_physical

HEADER = ["file"] + [
    column
    for parameter in PARAMETERS
    for column in (parameter.name, f"{parameter.name}_standard_error_from_validation_residuals")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    world = World()
    with report_errors(world):
        parser = OneLineParser("cosmoflow_dali.predict", __doc__)
        parser.add_argument("--weights", type=Path, required=True, help="a checkpoint or a reference .npz")
        parser.add_argument("--output", type=Path, metavar="FILE", help="CSV file (default: standard output)")
        text = "samples, shards or folders of them, in any format"
        parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=text)
        arguments = parser.parse_args(argv)
        paths, output = list(_expand(arguments.paths)), arguments.output
        configure_torch(torch.device("cpu"), world.cores)
        loaded = load_model(arguments.weights)
        if output is None:
            _write_rows(sys.stdout, loaded, _open(loaded, paths, output))
            return 0
        refuse_input(output, [arguments.weights])

        def write(file: BinaryIO) -> None:
            # A name that is not valid UTF-8 is written as it is.
            text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
            _write_rows(text, loaded, _open(loaded, paths, output))
            text.detach()

        write_output(output, write)
    return 0


def _expand(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield `paths`, and in place of patterns what they match; DataError for one that does not exist."""
    for path in paths:
        if path.exists():
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


def _open(loaded: LoadedModel, paths: Iterable[Path], output: Path | None) -> Iterator[SampleDataset]:
    """Open the samples at `paths`, one after the other; DataError for what must not be predicted."""
    for path in paths:
        for dataset in open_path(path, labeled=False):
            loaded.check_spec(path, dataset.spec)
            if output is not None:
                refuse_input(output, dataset.all_files())
            yield dataset


def _write_rows(file: TextIO, loaded: LoadedModel, datasets: Iterable[SampleDataset]) -> None:
    """Write the CSV file, and flush it after the line of each sample."""
    writer, header = csv.writer(file), [HEADER]
    for dataset in datasets:
        for index in range(len(dataset)):
            row = _predict(loaded, dataset, index)
            writer.writerows([*header, row])
            file.flush()
            check_output()
            header = []


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
