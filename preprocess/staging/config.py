"""How a data set is staged: which nodes are a team, and which samples each team gets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.errors import ConfigError
from pipelines.plan import Indices, permutation

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
"""As os.path.expandvars knows them."""


@dataclass(frozen=True, slots=True)
class StageConfig:
    """Staging of a data set to the local disks of the nodes.

    Args:
        dir: Folder on each node's own disk. It may contain environment variables, such as $TMPDIR, and
            becomes a copy of the shared data set or of a part of it.
        shard_type: "global" copies all samples to every node; "local" gives each team of nodes a part, and
            all teams together hold every sample.
        shard_multiplier: Nodes in a team, that is, copies of each sample, if shard_type is "local".
        preshuffle: Assign samples to teams at random by `seed`; otherwise team k of n gets every n-th sample.
        seed: Seed of that assignment only, so that runs with other seeds can reuse the staged samples.
        threads: Threads of each rank that read, decompress and write.
        direct_io: Bypass the page cache when reading from the shared file system.
    """

    dir: str
    shard_type: Literal["global", "local"] = "global"
    shard_multiplier: int = 1
    preshuffle: bool = False
    seed: int = 0
    threads: int = 8
    direct_io: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "shard_multiplier"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "must be at least 1")
        if self.shard_type == "global" and (self.shard_multiplier > 1 or self.preshuffle):
            raise ConfigError("shard_type", self.shard_type, "has one share; the other settings want local")

    @property
    def folder(self) -> Path:
        """`dir` on this node; ConfigError where it names an environment variable that is not set there."""
        folder = os.path.expandvars(self.dir)
        if "$" in folder:
            unset = _VARIABLE.search(folder)
            said = (
                f"{unset[0]} is not set on {os.uname().nodename}: set it" if unset else "a lone $: name one"
            )
            raise ConfigError("data.stage.dir", self.dir, f"{said}, or write the folder without a variable")
        return Path(folder)

    def teams(self, nodes: int, models: int = 1) -> list[list[int]]:
        """The nodes that have the same samples, for each share, of `nodes` that train `models` side by side.

        Each model has nodes in a row, and all samples on them. ConfigError where the nodes do not
        make up whole models, or a model's nodes whole teams.
        """
        if models < 1 or nodes % models:
            said = f"do not share out the {nodes} nodes: take {_choices(nodes)} models, or other nodes"
            raise ConfigError("models", models, said)
        own = nodes // models
        team = own if self.shard_type == "global" else self.shard_multiplier
        if own % team:
            said = f"does not divide the {own} nodes of a model: take {_choices(own)}, or other nodes"
            raise ConfigError("data.stage.shard_multiplier", team, said)
        return [
            [first + place for first in range(share, nodes, own) for place in range(team)]
            for share in range(0, own, team)
        ]


def _choices(nodes: int) -> str:
    """Into how many equal parts `nodes` nodes can be divided, in words."""
    found = [str(number) for number in range(1, nodes + 1) if nodes % number == 0]
    return " or ".join(found)


def share_of(samples: int, team: int, teams: int, seed: int | None) -> Indices:
    """Which of `samples` samples the `team`-th of `teams` teams keeps, in its order; `seed` draws them."""
    order = np.arange(samples) if seed is None else permutation(samples, seed, "preshuffle")
    return order[team::teams]
