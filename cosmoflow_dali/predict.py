"""Read parameters out of volumes: `python -m cosmoflow_dali.predict --weights W FILE ...`.

Writes CSV: a line for each file with the four parameters in physical units and, after each, the
standard error that the residuals on the checkpoint's own validation split imply (their root mean
square; the same for every file, and honest only for universes drawn as those were). Weights that
come without a validation leave these columns empty.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.training.pretrained import Trained, load_trained
from pipelines.dataset.open import read_sample
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World
from pipelines.errors import DataError
from pipelines.loading.transforms import transform
from pipelines.sample import HALF_RANGE, PARAMETERS, to_physical

HEADER = ["file"] + [
    column
    for parameter in PARAMETERS
    for column in (parameter.name, f"{parameter.name}_standard_error_from_validation_residuals")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    world = World()
    with report_errors(world):
        parser = OneLineParser(prog="python -m cosmoflow_dali.predict", description=__doc__)
        parser.add_argument("--weights", type=Path, required=True, help="a checkpoint or a reference .npz")
        parser.add_argument("--output", type=Path, help="the CSV file (default: standard output)")
        parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="samples, in any format")
        arguments = parser.parse_args(argv)
        configure_torch(torch.device("cpu"), world.cores)
        trained = load_trained(arguments.weights)
        rows = [_row(trained, path, arguments.weights) for path in arguments.files]
        if arguments.output is None:
            csv.writer(sys.stdout).writerows([HEADER, *rows])
            return 0
        try:
            with open(arguments.output, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([HEADER, *rows])
        except OSError as error:
            raise DataError(
                arguments.output, f"cannot be written ({error.strerror})", "name another --output"
            ) from error
    return 0


def _row(trained: Trained, path: Path, weights: Path) -> list[str]:
    sample = read_sample(path)
    size = sample.counts.shape[0]
    if size != trained.size:
        raise DataError(path, f"is {size} voxels wide", f"{weights} takes samples of {trained.size}")
    volume = torch.from_numpy(transform(sample.counts, apply_log=trained.apply_log))
    with torch.inference_mode():
        target = trained.model(volume.permute(3, 0, 1, 2)[None])[0]
    row = [str(path)]
    for parameter, value in zip(PARAMETERS, to_physical(target.numpy()), strict=True):
        error = ""
        if trained.residual_rms is not None:
            error = f"{parameter.mean * HALF_RANGE * trained.residual_rms[parameter.name]:.7g}"
        row += [f"{value:.7g}", error]
    return row


if __name__ == "__main__":
    sys.exit(main())
