"""What mpirun, torchrun and srun tell a process of its place among all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipelines.distributed.rendezvous import integer
from pipelines.errors import ConfigError


class Place(NamedTuple):
    """See `pipelines.distributed.session.World`, which begins with these."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str


def place_in(environ: Mapping[str, str]) -> Place | None:
    """The place that a launcher's variables in `environ` describe, None without any.

    ConfigError where they make no sense, or those of two launchers contradict each other.
    """
    told = [
        (launcher, launcher.place(environ))
        for launcher in _LAUNCHERS
        if launcher.rank in environ and launcher.size in environ
    ]
    if not told:
        return None
    for outer in told[1:]:
        _check_nesting(*told[0], *outer)
    return told[0][1]


class _Launcher(NamedTuple):
    """The variables in which a launcher tells a process its place."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str

    def place(self, environ: Mapping[str, str]) -> Place:
        """What these variables say, which are there; ConfigError where they make no sense."""
        rank, size = integer(environ, self.rank), integer(environ, self.size)
        if not rank < size:
            raise ConfigError(self.rank, rank, f"must be below {self.size} = {size}")
        # SLURM writes "4(x2),3" for two nodes of four tasks and one of three.
        text = environ.get(self.local_size, "1").split("(")[0].split(",")[0]
        return Place(rank, size, integer(environ, self.local_rank), int(text), self.name)


# Innermost first: an mpirun or torchrun inside a SLURM step sees the step's variables too.
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
    # MPICH's, Intel's and Cray's; srun sets the first two as well.
    _Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def _check_nesting(launcher: _Launcher, own: Place, outer: _Launcher, around: Place) -> None:
    """ConfigError unless `outer` can have started `launcher`, once for each task, or says the same."""
    each, rest = divmod(own.size, around.size)
    # An mpirun in a SLURM step has daemons for its tasks, in numbers of its own; each starts a rank at least.
    if each == 0 or (own.launcher != "mpirun" and (rest or own.rank // each != around.rank)):
        raise ConfigError(
            f"{launcher.rank} and {launcher.size}",
            f"{own.rank} and {own.size}",
            f"{outer.rank} and {outer.size} are {around.rank} and {around.size}: unset those that are stale",
        )
