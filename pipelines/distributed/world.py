"""Rank arithmetic: the position of this process among all ranks, its cores and its device.

Imports nothing heavy and communicates with no other rank; `pipelines.distributed.session` does that.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.distributed.environment import read_rank_info
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    import torch


IN_ORDER = "start equally many ranks on every node, numbered node by node"

_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""The hierarchies of control groups, and the groups of this process; see cgroups(7)."""

_MEMINFO = Path("/proc/meminfo")


def available_cores() -> int:
    """Return the number of cores this process may use.

    These are the cores that the launcher bound it to, or all, but no more than the CPU time that a container
    or a batch system grants it: `docker --cpus=2` leaves all cores of the host visible.
    """
    return min([len(os.sched_getaffinity(0)), *(max(1, math.ceil(quota)) for quota in _cpu_quotas())])


def available_memory() -> int:
    """Return the bytes of memory that new processes may take.

    They are those that the node has left, but no more than a container or a batch system grants this process.
    """
    available = sys.maxsize
    with suppress(OSError, KeyError, ValueError):
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
    for group, version in _groups("memory"):
        with suppress(OSError, ValueError):
            # No limit is "max" in version 2, and more than any node has in version 1.
            limit = (group / ("memory.max" if version == 2 else "memory.limit_in_bytes")).read_text()
            available = min(available, max(0, int(limit) - _held_memory(group, version)))
    return available


def _held_memory(group: Path, version: int) -> int:
    """Return the bytes that the processes of `group` hold beside files, which are dropped; 0 if unknown."""
    with suppress(OSError, KeyError, ValueError):
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(fields["anon" if version == 2 else "total_rss"])
    return 0


def _cpu_quotas() -> Iterator[float]:
    """Yield each limit of CPU time of this process's groups and of those around them, in cores."""
    for group, version in _groups("cpu"):
        with suppress(OSError, ValueError):
            if version == 1:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (group / "cpu.max").read_text().split()
            # No limit is "max" in version 2, and -1 in version 1.
            if (cores := int(quota) / int(period)) > 0:
                yield cores


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folders of this process's groups and of those around them, and the version of their files."""
    try:
        groups = [line.split(":", 2)[1:] for line in _OWN_CGROUPS.read_text().splitlines()]
    except OSError:
        return
    for controllers, path in groups:
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one hierarchy without a name. In a container the topmost folder may be the own group.
        root = _CGROUPS / controller if controllers else _CGROUPS
        folder = root / path.lstrip("/")
        for group in {folder, *(parent for parent in folder.parents if parent.is_relative_to(root)), root}:
            yield group, 1 if controllers else 2


@dataclass(frozen=True, slots=True)
class World:
    """Position of this process among the ranks of one job, or of one of its instances.

    rank, size: of this process, and number of ranks.
    local_rank, local_size: the same on this node; `local_rank` selects the GPU.
    launcher: "torchrun", "mpirun", "srun", "horovodrun", "flux" or "none".
    instance, num_instances: which of how many independent runs of one job this rank belongs to.
    local_rank_offset: number of this node's ranks that belong to earlier instances.
    other_local_ranks: number of this node's ranks that belong to any other instance.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"
    instance: int = 0
    num_instances: int = 1
    local_rank_offset: int = 0
    other_local_ranks: int = 0

    @staticmethod
    def detect(environ: Mapping[str, str] = os.environ) -> World:
        """Return the world that a launcher's variables in `environ` describe; one rank without a launcher."""
        info = read_rank_info(environ)
        return World() if info is None else World(*info)

    def partition_ranks(self, instances: int) -> World:
        """Return this rank's world after all ranks are divided into `instances` consecutive groups.

        Raises:
            ConfigError: The groups are not of equal size, or are neither whole nodes nor equal parts of one.
        """
        if instances == 1:
            return self
        if instances < 1 or self.size % instances:
            raise ConfigError("--instances", instances, f"does not divide {self.size} ranks evenly")
        if self.launcher == "srun":
            raise ConfigError("--instances", instances, "is not for srun; use NUM_INSTANCES=N of run.sub")
        each = self.size // instances
        local = min(each, self.local_size)
        if each % local or self.local_size % local:
            fault = f"gives each instance {each} ranks, which do not fit nodes of {self.local_size}"
            raise ConfigError("--instances", instances, fault)
        local_rank = self.local_rank % local
        return World(
            self.rank % each,
            each,
            local_rank,
            local,
            self.launcher,
            instance=self.rank // each,
            num_instances=instances,
            local_rank_offset=self.local_rank - local_rank,
            other_local_ranks=self.local_size - local,
        )

    @property
    def cores(self) -> int:
        """Cores for this rank: those that the launcher bound it to, or its share of the node's."""
        cores, ranks = available_cores(), self.local_size + self.other_local_ranks
        return max(1, cores // ranks if cores >= ranks else 1)

    @property
    def memory(self) -> int:
        """Bytes of memory that this rank's processes may take: its share of what the node has left."""
        return available_memory() // (self.local_size + self.other_local_ranks)

    @property
    def nodes(self) -> int:
        """Number of nodes, if all have equally many ranks, which `check_nodes` verifies."""
        return max(1, self.size // self.local_size)

    @property
    def single_node(self) -> bool:
        """True if all ranks are on this node."""
        return self.local_size == self.size

    @property
    def node(self) -> int:
        """Number of this rank's node; ConfigError unless ranks are numbered node by node."""
        self.check_order()
        return self.rank // self.local_size

    def check_order(self) -> None:
        """Raise ConfigError if this rank's number shows that ranks are not numbered node by node."""
        if self.rank % self.local_size != self.local_rank or self.size % self.local_size:
            fault = f"is number {self.local_rank} of {self.local_size} on its node; "
            raise ConfigError("rank", self.rank, fault + IN_ORDER)

    @property
    def is_root(self) -> bool:
        """True on rank 0, which writes the logs."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """Return this rank's device of `kind` "auto", "cpu" or "cuda"; ConfigError if there is none."""
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if kind == "cpu" or (kind == "auto" and gpus == 0):
            return torch.device("cpu")
        if gpus == 0:
            raise ConfigError("device", kind, "no GPU is visible; use device: cpu or auto")
        if gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
            # The launcher gave each rank a GPU of its own, the only one that it sees.
            return torch.device("cuda", 0)
        ranks = self.local_size + self.other_local_ranks
        # All ranks of the node come to the same result, so that rank 0 can print it.
        if ranks > gpus:
            raise ConfigError(
                "device", kind, f"{ranks} ranks on this node but {gpus} GPUs; start one rank a GPU"
            )
        return torch.device("cuda", self.local_rank_offset + self.local_rank)
