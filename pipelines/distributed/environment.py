"""Rank and number of ranks, as mpirun, torchrun and srun give them in environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipelines.errors import ConfigError


class RankInfo(NamedTuple):
    """The first fields of `pipelines.distributed.world.World`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str


def integer(environ: Mapping[str, str], name: str, default: int = 0, *, least: int = 0) -> int:
    """Return the whole number in the variable `name`, or `default` if it is not set.

    Raises:
        ConfigError: The value is not a whole number, or below `least`.
    """
    text = environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(name, text, f"must be a whole number, at least {least}")
    return int(text)


def read_rank_info(environ: Mapping[str, str]) -> RankInfo | None:
    """Return this process's rank as a launcher's variables in `environ` give it, None without a launcher.

    Raises:
        ConfigError: The variables make no sense, or those of two launchers contradict each other.
    """
    found = [
        (launcher, launcher.read(environ))
        for launcher in _LAUNCHERS
        if launcher.rank in environ and launcher.size in environ
    ]
    if not found:
        return None
    for outer in found[1:]:
        _check_nesting(*found[0], *outer)
    return found[0][1]


class _Launcher(NamedTuple):
    """The names of a launcher's variables."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str

    def read(self, environ: Mapping[str, str]) -> RankInfo:
        """Return the values of these variables, which are set; ConfigError if they make no sense."""
        rank, size = integer(environ, self.rank), integer(environ, self.size)
        if not rank < size:
            raise ConfigError(self.rank, rank, f"must be below {self.size} = {size}")
        # SLURM writes "4(x2),3" for two nodes of four tasks and one of three.
        text = environ.get(self.local_size, "1").split("(")[0].split(",")[0]
        return RankInfo(rank, size, integer(environ, self.local_rank), int(text), self.name)


# Innermost first: an mpirun or torchrun inside a SLURM step has the step's variables, too.
_LAUNCHERS = (
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    # MPICH, Intel MPI and Cray MPI; srun sets the first two as well.
    _Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def _check_nesting(launcher: _Launcher, own: RankInfo, outer: _Launcher, around: RankInfo) -> None:
    """Raise ConfigError unless `outer` can have started `launcher` once per task, or both agree."""
    each, rest = divmod(own.size, around.size)
    # An mpirun in a SLURM step has one daemon per task, numbered differently; each starts at least one rank.
    if each == 0 or (own.launcher != "mpirun" and (rest or own.rank // each != around.rank)):
        raise ConfigError(
            f"{launcher.rank} and {launcher.size}",
            f"{own.rank} and {own.size}",
            f"{outer.rank} and {outer.size} are {around.rank} and {around.size}: unset the stale ones",
        )
