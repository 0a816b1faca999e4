"""Settings of staging: which nodes form a team, and which samples each team gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.errors import ConfigError, check_field
from pipelines.filesystem import node_folder
from pipelines.plan import Indices, permutation


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
            check_field(self, name, getattr(self, name) >= 1, "must be at least 1")
        consistent = self.shard_type == "local" or not (self.shard_multiplier > 1 or self.preshuffle)
        remedy = "gives every node all samples; shard_multiplier and preshuffle need local"
        check_field(self, "shard_type", consistent, remedy)

    @property
    def folder(self) -> Path:
        """`dir` on this node; ConfigError if it names an environment variable that is not set there."""
        return node_folder(self.dir, "data.stage.dir")

    def teams(self, nodes: int, num_instances: int = 1, nodes_per_sample: int = 1) -> list[list[int]]:
        """Return the nodes of each team; a team holds the same samples on all of its nodes.

        Args:
            nodes: Number of nodes in all.
            num_instances: Number of models that train side by side, each on consecutive nodes which together
                hold all samples.
            nodes_per_sample: Number of consecutive nodes that share every sample, and so are of one team.

        Raises:
            ConfigError: The instances do not divide the nodes evenly, or the teams those of an instance, or
                the nodes that share samples those of a team.
        """
        if num_instances < 1 or nodes % num_instances:
            fault = f"does not divide {nodes} nodes evenly; choose {_divisors(nodes)}, or other nodes"
            raise ConfigError("--models", num_instances, fault)
        own = nodes // num_instances
        team = own if self.shard_type == "global" else self.shard_multiplier
        if own % team:
            fault = (
                f"does not divide the {own} nodes of a model evenly; choose {_divisors(own)}, or other nodes"
            )
            raise ConfigError("data.stage.shard_multiplier", team, fault)
        if nodes_per_sample < 1 or own % nodes_per_sample:
            fault = f"does not divide the {own} nodes of a model evenly; choose {_divisors(own)}"
            raise ConfigError("--nodes-per-sample", nodes_per_sample, fault)
        if team % nodes_per_sample:
            fault = f"is no multiple of the {nodes_per_sample} nodes that share every sample"
            raise ConfigError("data.stage.shard_multiplier", team, fault)
        return [
            [first + place for first in range(start, nodes, own) for place in range(team)]
            for start in range(0, own, team)
        ]


def _divisors(number: int) -> str:
    """Return the divisors of `number` as text."""
    return " or ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def partition_indices(samples: int, team: int, teams: int, seed: int | None) -> Indices:
    """Return the indices that team number `team` of `teams` keeps of `samples` samples, in its order.

    Args:
        samples: Number of samples.
        team: Number of the team, from 0.
        teams: Number of teams.
        seed: Draws the partitions; None gives each team every `teams`-th sample.
    """
    order = np.arange(samples) if seed is None else permutation(samples, seed, "preshuffle")
    return order[team::teams]
