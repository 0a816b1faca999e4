"""A process that simulates universes for `preprocess.simulate`: one JSON line in, one line out.

It is a program of its own, not a `multiprocessing` child, so that it imports nothing of what its
parent imported (MPI and CUDA must not be started twice) and so that it ends by itself: when the
parent dies, its input ends. The first line holds the settings and the folder, each later one a
[split, universe] to make; the answer is {"files": ..., "bytes": ...} or {"error": ...}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from pipelines.errors import UserError
from pipelines.formats import FORMATS
from preprocess.universe import SimulateConfig, SplitName, simulate_universe


def make(config: SimulateConfig, root: Path, split: SplitName, universe: int) -> dict[str, int]:
    """Simulate one universe and write its samples; how many files and bytes they are."""
    directory = root / split
    written = [
        path
        for stem, sample in simulate_universe(config, split, universe)
        for path in FORMATS[config.format].write(directory, stem, sample)
    ]
    return {"files": len(written), "bytes": sum(path.stat().st_size for path in written)}


def main() -> None:
    """Answer requests until there are no more."""
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    header = json.loads(sys.stdin.readline())
    config, root = SimulateConfig(**header["config"]), Path(header["root"])
    for line in sys.stdin:
        split, universe = json.loads(line)
        try:
            answer: dict[str, int | str] = {**make(config, root, split, universe)}
        except (OSError, UserError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
