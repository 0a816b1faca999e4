"""Predict cosmological parameters from volumes: `python -m cosmoflow_dali.predict --weights W FILE ...`.

Writes CSV: one line per file with the four parameters in physical units, each followed by its
standard error. That is the root mean square residual on the validation split of the checkpoint's
run: the same for every file, and valid only for universes drawn like those of that split. It is
empty for weights without a validation.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.training.pretrained import LoadedModel, load_model
from pipelines.console import check_output
from pipelines.dataset.open import read_sample
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World
from pipelines.errors import writing
from pipelines.loading.transforms import transform
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
        parser = OneLineParser(prog="python -m cosmoflow_dali.predict", description=__doc__)
        parser.add_argument("--weights", type=Path, required=True, help="a checkpoint or a reference .npz")
        parser.add_argument("--output", type=Path, help="CSV file (default: standard output)")
        parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="samples, in any format")
        arguments = parser.parse_args(argv)
        configure_torch(torch.device("cpu"), world.cores)
        loaded = load_model(arguments.weights)
        rows = [HEADER, *(_predict(loaded, path) for path in arguments.files)]
        if arguments.output is None:
            csv.writer(sys.stdout).writerows(rows)
            check_output()
            return 0
        path = arguments.output
        with writing(path), open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows(rows)
    return 0


def _predict(loaded: LoadedModel, path: Path) -> list[str]:
    """Return the line of the CSV file for the sample at `path`."""
    sample = read_sample(path)
    loaded.check_size(path, sample.counts.shape[0])
    volume = torch.from_numpy(transform(sample.counts, apply_log=loaded.apply_log))
    with torch.inference_mode():
        target = loaded.model(volume.permute(3, 0, 1, 2)[None])[0]
    row = [str(path)]
    for parameter, value in zip(PARAMETERS, to_physical(target.numpy()), strict=True):
        rms = loaded.residual_rms
        error = f"{parameter.mean * HALF_RANGE * rms[parameter.name]:.7g}" if rms else ""
        row += [f"{value:.7g}", error]
    return row


if __name__ == "__main__":
    sys.exit(main())
