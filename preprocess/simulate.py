"""Make a data set of simulated universes in the published format.

    python -m preprocess.simulate -o data/embedded --train 4096 --validation 512

A run makes what is missing: one that was stopped goes on where it was, a complete folder costs a
look at its file names, and a folder can grow. `simulation.json` in the folder says what it was made
with, and other settings are refused there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World, available_cores
from pipelines.errors import ConfigError, DataError
from pipelines.formats.registry import FORMATS
from pipelines.io import final_name, locked, remove_temporaries, write_chunks
from pipelines.sample import SPLITS, SplitName
from preprocess.conversion.progress import STOPPED, progress
from preprocess.conversion.worker_pool import run_jobs
from preprocess.simulator.universe import SimulateConfig, Simulation

__all__ = ["SETTINGS", "SimulateConfig", "make_dataset"]

SETTINGS = "simulation.json"
"""The file in a data set's folder that records what its universes were made with."""

_VERSION = 1
"""Of the simulation: to be raised by every change that makes other universes of the same settings."""


def make_dataset(config: SimulateConfig, root: Path, *, workers: int, shown: bool) -> None:
    """Make the samples of `config` that are missing in `root`/train and `root`/validation.

    The files do not depend on `workers`, processes of one thread each. With `shown`, a bar on a
    terminal's stderr (a line now and then where that is none) and what was made in the end.

    Raises ConfigError for settings other than those that `root` was made with, DataError for a
    `root` that holds something else, UserError for a worker that cannot go on.
    """
    root = Path(root).absolute()
    _check_settings(config, root)
    if not _missing(config, root):
        if shown:
            print(f"{root}: complete")
        return
    if workers < 1:
        raise ConfigError("workers", workers, "expected at least one process")
    start = time.perf_counter()

    def tell_of_waiting() -> None:
        if shown:
            print(f"{root}: another process is simulating into it; waiting for that", file=sys.stderr)

    try:
        for split in SPLITS:
            (root / split).mkdir(parents=True, exist_ok=True)
        with locked(root, tell_of_waiting) as lock:
            _check_settings(config, root)
            for folder in (root, *(root / split for split in SPLITS)):
                remove_temporaries(folder)
            record = json.dumps({"version": _VERSION, **asdict(config)}, indent=2) + "\n"
            write_chunks(root / SETTINGS, record.encode())
            files = size = 0
            jobs = _missing(config, root)
            made = run_jobs(Simulation(asdict(config), str(root)), jobs, workers, (lock,))
            # The iterator's own clean-up ends the workers, also when Ctrl-C arrives right here.
            with (
                contextlib.closing(made),
                progress(len(jobs), "simulated", "universe", shown=shown) as advance,
            ):
                for _, written in made:
                    files, size = files + len(written), size + sum(written)
                    advance()
    except OSError as error:
        raise DataError(root, f"cannot be written ({error})", "choose or mend the folder") from error
    if shown:
        seconds = time.perf_counter() - start
        print(f"simulated {len(jobs)} universes: {files} files, {size / 1e6:.1f} MB, {seconds:.1f} s")


def _missing(config: SimulateConfig, root: Path) -> list[tuple[SplitName, int]]:
    """The universes that lack a sample, in order."""
    jobs: list[tuple[SplitName, int]] = []
    suffix = FORMATS[config.format].suffix
    for split in SPLITS:
        try:
            present = set(os.listdir(root / split))
        except FileNotFoundError:
            present = set()
        jobs += [
            (split, universe)
            for universe in range(config.universes(split))
            if any(stem + suffix not in present for stem in config.stems(split, universe))
        ]
    return jobs


def _check_settings(config: SimulateConfig, root: Path) -> None:
    """Refuse a root that was made with other settings, or by something else."""
    path = root / SETTINGS
    try:
        recorded = json.loads(path.read_bytes())
    except FileNotFoundError:
        for split in SPLITS:
            folder = root / split
            if folder.is_dir() and not all(final_name(path.name) for path in folder.iterdir()):
                raise DataError(
                    root,
                    f"holds {split}/ but no {SETTINGS}",
                    "choose another folder to simulate into",
                ) from None
        return
    except (OSError, ValueError) as error:
        raise DataError(path, f"cannot be read ({error})", "remove the folder, or choose another") from error
    ours = {"version": _VERSION, **asdict(config)}
    for key, value in ours.items():
        there = recorded.get(key) if isinstance(recorded, dict) else None
        if key in SPLITS and isinstance(there, int):
            if value < there:
                raise ConfigError(
                    f"simulate.{key}",
                    value,
                    f"{root} has {there}: ask for as many or more, or for another folder",
                )
        elif value != there:
            raise ConfigError(
                f"simulate.{key}",
                value,
                f"{root} was made with {there!r}: ask for that, or for another folder",
            )


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 if the data set is complete."""
    defaults = SimulateConfig()
    parser = OneLineParser(
        prog="python -m preprocess.simulate",
        description="Simulate universes and write their samples in the published format.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options = {
        "train": (int, "universes to train on"),
        "validation": (int, "universes to validate on"),
        "size": (int, "voxels along each edge of a sample"),
        "voxel": (float, "edge of a voxel in Mpc/h, where H_0 is 70"),
        "steps": (int, "time steps in all"),
        "crops": (int, "samples along each edge of a universe"),
        "seed": (int, "seed of all universes"),
        "format": (str, "of the files, one of " + ", ".join(sorted(FORMATS))),
    }
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the data set")
    for name, (kind, text) in options.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name), help=text)
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    arguments = parser.read(argv)
    with report_errors(World(), STOPPED):
        config = SimulateConfig(**{name: getattr(arguments, name) for name in options})
        make_dataset(config, arguments.output, workers=arguments.workers, shown=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
