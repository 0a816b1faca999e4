"""Make a data set of simulated universes in the published format.

    python -m preprocess.simulate -o data/embedded --train 4096 --validation 512

A run makes what is missing: after one that was stopped the same command resumes, a complete folder costs
one listing, and a folder can grow. `simulation.json` in the folder records its settings; other settings
are refused there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from pipelines.console import print_line
from pipelines.distributed.cli import OneLineParser, report_errors, target_location
from pipelines.distributed.world import World, available_cores, available_memory
from pipelines.errors import ConfigError, DataError, MissingError, writing, yaml_text
from pipelines.filesystem import is_hidden
from pipelines.formats.registry import FORMATS
from pipelines.io import remove_temporaries
from pipelines.sample import ALL_SPLITS, SPLITS, SplitName
from pipelines.settings import add_flags, build
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of
from preprocess.conversion.journal import names_in
from preprocess.conversion.progress import STOPPED, lock_target, track
from preprocess.conversion.worker_pool import fit_workers, run_tasks
from preprocess.simulator.universe import SimulateConfig, SimulateTask

__all__ = ["SETTINGS", "SimulateConfig", "make_dataset"]

SETTINGS = "simulation.json"
"""File in a data set's folder that records its settings."""

_VERSION = 1
"""Version of the simulation: to be raised by every change that makes other universes of the same settings."""


def make_dataset(config: SimulateConfig, root: Location, *, workers: int, shown: bool) -> None:
    """Make the samples of `config` that are missing in the folders of the splits in `root`.

    Args:
        config: Settings of the data set.
        root: Its folder, which may be one of an object store.
        workers: Number of processes, of one thread each, if they fit into the memory; the files do not
            depend on it.
        shown: Show the progress, and in the end what was made.

    Raises:
        ConfigError: `root` was made with other settings.
        DataError: `root` holds something else, or cannot be written.
        UserError: A worker process died.
    """
    if isinstance(root, Path):
        root = root.absolute()
    _check_settings(config, root)
    if not _missing(config, root):
        if shown:
            print_line(f"{root}: complete")
        return
    if workers < 1:
        raise ConfigError("workers", workers, "expected at least one process")
    start = time.perf_counter()
    with writing(root):
        folders = [root / split for split in ALL_SPLITS if split in SPLITS or getattr(config, split)]
        local = [folder for folder in (root, *folders) if isinstance(folder, Path)]
        for folder in local:
            folder.mkdir(parents=True, exist_ok=True)
        with lock_target(root, shown=shown) as lock:
            tested = _check_settings(config, root)
            for folder in local:
                remove_temporaries(folder)
            settings = {"version": _VERSION, **asdict(config), "test": max(config.test, tested)}
            storage_of(root).write(root / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
            lengths: list[int] = []
            universes = _missing(config, root)
            workers = fit_workers(workers, config.memory, available_memory(), shown=shown)
            running = run_tasks(SimulateTask(config, root), universes, workers, lock)
            with contextlib.closing(running):
                for _, written in track(running, len(universes), "simulated", "universe", shown=shown):
                    lengths += written
    if shown:
        seconds, size = time.perf_counter() - start, sum(lengths) / 1e6
        print(f"simulated {len(universes)} universes: {len(lengths)} files, {size:.1f} MB, {seconds:.1f} s")


def _missing(config: SimulateConfig, root: Location) -> list[tuple[SplitName, int]]:
    """Return the universes that lack a sample, in order."""
    suffix = FORMATS[config.format].suffix
    present = {split: set(names_in(root / split)) for split in ALL_SPLITS}
    return [
        (split, universe)
        for split in ALL_SPLITS
        for universe in range(getattr(config, split))
        if any(name + suffix not in present[split] for name in config.sample_ids(split, universe))
    ]


def _check_settings(config: SimulateConfig, root: Location) -> int:
    """Raise an error if `root` was made with other settings, or by something else.

    Returns:
        Test universes that `root` was asked to hold so far. A run asks for none, whatever is there.
    """
    path = root / SETTINGS
    try:
        recorded = json.loads(storage_of(path).read(path))
    except MissingError:
        for split in ALL_SPLITS:
            if not all(map(is_hidden, names_in(root / split))):
                fault = f"holds {split}/ but no {SETTINGS}"
                raise DataError(root, fault, "choose another folder to simulate into") from None
        return 0
    except ValueError as error:
        raise DataError(path, f"cannot be read ({error})", "remove the folder, or choose another") from error
    if isinstance(recorded, dict):
        # Data sets of earlier versions have none.
        recorded.setdefault("test", 0)
    for key, value in {"version": _VERSION, **asdict(config)}.items():
        there = recorded.get(key) if isinstance(recorded, dict) else None
        can_grow = key in ALL_SPLITS and isinstance(there, int)
        if key == "test" and can_grow and value < there:
            continue
        if value != there and not (can_grow and value > there):
            made = yaml_text(there)
            fault = f"{root} was made with {made}; choose {made}{' or more' * can_grow}, or another folder"
            raise ConfigError(f"simulate.{key}", value, fault)
    tested: int = recorded["test"]
    return tested


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0 when the data set is complete."""
    text = "Simulate universes and write their samples in the published format."
    parser = OneLineParser("preprocess.simulate", text)
    text = "folder or URL of the data set"
    parser.add_argument("-o", "--output", type=target_location, required=True, help=text)
    add_flags(parser, SimulateConfig)
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    arguments = parser.read(argv)
    with report_errors(World(), STOPPED):
        values = vars(arguments)
        output, workers = values.pop("output"), values.pop("workers")
        make_dataset(build(SimulateConfig, values, "simulate."), output, workers=workers, shown=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
