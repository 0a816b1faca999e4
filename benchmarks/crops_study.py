"""Compare a network of whole boxes with the average of a network's predictions over their crops.

    python benchmarks/crops_study.py --pilot
    python benchmarks/crops_study.py --output

The same simulated universes are boxes of 64^3 voxels of 4 Mpc/h, and eight crops of 32^3 each. The networks
are trained by `cosmoflow_dali.train` with configs/default.yaml and the differences below, for the same number
of epochs of the same universes, and scored on a test split that no training and no choice has seen. Finished
runs in --runs are kept, so that several processes can share the work, each with its own --seeds or --arms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.crops_summary import (
    RESULT,
    average,
    correct,
    draw,
    load,
    predictions_path,
    show,
    summarise,
)
from cosmoflow_dali.posterior.fitted import number_universes
from cosmoflow_dali.training.evaluation import evaluate
from cosmoflow_dali.training.pretrained import load_model
from cosmoflow_dali.training.run_dir import CHECKPOINTS
from pipelines.dataset.open import open_folder
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.tables import format_table
from preprocess.simulate import make_dataset
from preprocess.simulator.universe import SimulateConfig

ROOT = Path(__file__).resolve().parent.parent
BOX = SimulateConfig(train=1024, validation=256, test=1024, size=64, voxel=4.0, steps=4)
DATA = {"boxes": BOX, "crops": replace(BOX, size=32, crops=2)}
"""Data sets by name: the same universes, as the seed and the box are the same."""

EPOCHS = 4


@dataclass(frozen=True, slots=True)
class Arm:
    """Settings of the training on a data set.

    Args:
        widths: Filters of the open network's blocks.
        symmetries: "periodic" holds for boxes; crops have none, as a mirror image is none here.
        batch_size, peak_lr: As chosen by the pilot.
    """

    widths: tuple[int, ...]
    symmetries: str
    batch_size: int
    peak_lr: float


ARMS = {
    "crops": Arm((8, 16, 32, 64), "false", 16, 0.01),
    "boxes": Arm((8, 16, 32, 64, 128), "periodic", 4, 0.003),
}
"""Settings by data set."""

PILOT = {
    "crops": ((16, 0.01), (32, 0.01), (16, 0.005)),
    "boxes": ((4, 0.003), (2, 0.002), (4, 0.01)),
}
"""Batch sizes and peak learning rates that the pilot tries: as many for both."""

PILOT_UNIVERSES, PILOT_SEED = 512, 100


def predict(folder: Path, data: Path, name: str, split: str) -> None:
    """Write the outputs of the run in `folder` for a split of data set `name` there, if they are missing."""
    path = predictions_path(folder, name, split)
    if path.exists():
        return
    samples = open_folder(data / name / split)
    # A network with global pooling takes samples of any size.
    model = load_model(max((folder / CHECKPOINTS).glob("*.pt"))).model
    loader = Loader(
        samples,
        LoaderConfig(batch_size=4),
        rank_slice=RankSlice(),
        seed=0,
        shuffle=False,
        ragged="pad",
        device=torch.device("cpu"),
    )
    with contextlib.closing(loader):
        scored = evaluate(model, loader, Session(World()))
    universes = number_universes([samples.sample_id(i) for i in range(len(samples))])
    count = int(universes.max()) + 1
    order = np.argsort(universes, kind="stable")
    outputs, targets = (
        values[order].reshape(count, -1, 4) for values in (scored.predictions, scored.targets)
    )
    np.savez(path, outputs=outputs, targets=targets[:, 0])


def run(name: str, arm: Arm, universes: int, seed: int, data: Path, folder: Path) -> None:
    """Train on the first `universes` universes of data set `name` unless `folder` has the result, a CPU time.

    The CPU time is that of the last start, if the run was killed and started again.
    """
    result = folder / RESULT
    if result.exists():
        return
    settings = {
        "data.dir": _first(data / name, universes, DATA[name].crops ** 3),
        "data.simulate": "null",
        "model.size": DATA[name].size,
        "model.widths": list(arm.widths),
        "loader.batch_size": arm.batch_size,
        "schedule.peak_lr": arm.peak_lr,
        "symmetries": arm.symmetries,
        "posterior": "null",
        "epochs": EPOCHS,
        "seed": seed,
    }
    flags = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "cosmoflow_dali.train", "--run-dir", str(folder), "--resume", *flags]
    config = ["--config", str(ROOT / "configs/default.yaml")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *config], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result.write_text(json.dumps({"cpu_seconds": cpu}) + "\n")


def _first(data: Path, universes: int, samples: int) -> Path:
    """Return a folder with the first `universes` training universes of `data`, of `samples` samples each."""
    folder = data.with_name(f"{data.name}_{universes}")
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        names = sorted(os.listdir(data / split))
        for name in names[: universes * samples] if split == "train" else names:
            with contextlib.suppress(FileExistsError):
                os.link(data / split / name, folder / split / name)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of the data sets")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/crops_study", help="folder of the runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--universes", nargs="+", type=int, default=[BOX.train], help="for training")
    parser.add_argument("--pilot", action="store_true", help="try batch sizes and learning rates")
    parser.add_argument("--workers", type=harness.positive, default=2, help="processes that simulate")
    parser.add_argument("--picture", type=Path, help="draw the figure to this file")
    options = parser.parse_args(argv)
    for name, config in DATA.items():
        make_dataset(config, options.data_dir / name, workers=options.workers, shown=True)
    results = pilot(options.arms, options.data_dir, options.runs) if options.pilot else study(options)
    if options.output:
        print("written to", harness.save("crops_study", vars(options), results, options.output))


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Train, predict, print tables and draw as `options` say; return the errors by number of universes."""
    results = {}
    for universes in options.universes:
        folders: dict[str, list[Path]] = {name: [] for name in options.arms}
        for seed in options.seeds:
            for name in options.arms:
                folder = options.runs / f"{name}-{universes}-{seed}"
                run(name, ARMS[name], universes, seed, options.data_dir, folder)
                for data in sorted({name, "boxes"}):
                    for split in ("validation", "test"):
                        predict(folder, options.data_dir, data, split)
                folders[name].append(folder)
        summary = summarise(folders)
        show(universes, summary)
        if options.picture:
            draw(summary, options.picture)
        results[str(universes)] = summary
    return results


def pilot(arms: Sequence[str], data: Path, runs: Path) -> dict[str, Any]:
    """Print and return the validation errors of the average over samples for each recipe of `PILOT`."""
    rows, result = [["", "batch size", "peak_lr", "validation MAE", "corrected"]], {}
    for name in arms:
        for batch_size, peak_lr in PILOT[name]:
            folder = runs / f"pilot-{name}-{batch_size}-{peak_lr}"
            arm = replace(ARMS[name], batch_size=batch_size, peak_lr=peak_lr)
            run(name, arm, PILOT_UNIVERSES, PILOT_SEED, data, folder)
            predict(folder, data, name, "validation")
            scored = load(folder, name, "validation")
            guesses = {"average": average(scored), "corrected": correct(scored, scored)}
            errors = {key: float(np.abs(guess - scored.targets).mean()) for key, guess in guesses.items()}
            rows.append([name, str(batch_size), str(peak_lr), *(f"{value:.4f}" for value in errors.values())])
            result[f"{name}, batch size {batch_size}, peak_lr {peak_lr}"] = errors
    print(format_table(rows))
    return result


if __name__ == "__main__":
    main()
