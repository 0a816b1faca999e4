"""Rank and number of ranks, as launchers give them in environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from pipelines.errors import ConfigError

_INT32 = 2**31 - 1
_SET = "set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for every rank"


class RankInfo(NamedTuple):
    """The first fields of `pipelines.distributed.world.World`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str


def integer(
    environ: Mapping[str, str], name: str, default: int = 0, *, least: int = 0, most: int = _INT32
) -> int:
    """Return the whole number in the variable `name`, or `default` if it is not set.

    Raises:
        ConfigError: The value is not a whole number from `least` to `most`.
    """
    text = environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        limits = f"at least {least}" if most == _INT32 else f"from {least} to {most}"
        raise ConfigError(name, text, f"must be a whole number, {limits}")
    return int(text)


def read_rank_info(environ: Mapping[str, str]) -> RankInfo | None:
    """Return this process's rank as launchers' variables in `environ` give it, None without a launcher.

    Rank and size are those of the innermost launcher. What it does not give, such as the local size, is taken
    from others with the same rank and size.

    Raises:
        ConfigError: The variables make no sense, are incomplete, or contradict each other.
    """
    found = [launcher for launcher in _LAUNCHERS if launcher.rank in environ and launcher.size in environ]
    if not found:
        _refuse_rank_without_size(environ)
        return None
    inner, position = found[0], found[0].position(environ)
    same = [launcher for launcher in found if launcher.position(environ) == position]
    for outer in found:
        if outer not in same:
            _check_nesting(environ, inner, position, outer, outer.position(environ))
    rank, size = position
    ranks = {
        each.local_rank: integer(environ, each.local_rank) for each in same if each.local_rank in environ
    }
    sizes = {each.local_size: _ranks_of_node(environ, each) for each in same if each.local_size in environ}
    if size == 1:
        ranks, sizes = ranks or {"LOCAL_RANK": 0}, sizes or {"LOCAL_WORLD_SIZE": 1}
    local_rank, local_size = _agreed(ranks, "LOCAL_RANK", size), _agreed(sizes, "LOCAL_WORLD_SIZE", size)
    if local_size > size:
        raise ConfigError(next(iter(sizes)), local_size, f"must be at most {inner.size} = {size}")
    if local_rank >= local_size:
        raise ConfigError(next(iter(ranks)), local_rank, f"must be below {next(iter(sizes))} = {local_size}")
    return RankInfo(rank, size, local_rank, local_size, same[-1].name)


class _Launcher(NamedTuple):
    """The names of a launcher's variables."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str

    def position(self, environ: Mapping[str, str]) -> tuple[int, int]:
        """Return rank and size, which are set; ConfigError if they make no sense."""
        rank, size = integer(environ, self.rank), integer(environ, self.size)
        if not rank < size:
            raise ConfigError(self.rank, rank, f"must be below {self.size} = {size}")
        return rank, size


# Innermost first: an mpirun or torchrun inside a SLURM step has the step's variables, too. If a launcher does
# not give the local size, the user does.
_LAUNCHERS = (
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    # DeepSpeed's launcher.
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    _Launcher("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    *(
        _Launcher(
            "mpirun", f"{prefix}_RANK", f"{prefix}_SIZE", f"{prefix}_LOCAL_RANK", f"{prefix}_LOCAL_SIZE"
        )
        # OpenMPI, MVAPICH 2 and 3, IBM's jsrun, and Cray's and other PMI.
        for prefix in ("OMPI_COMM_WORLD", "MV2_COMM_WORLD", "MVP_COMM_WORLD", "JSM_NAMESPACE", "PMI")
    ),
    # MPICH and Intel MPI, then Cray PALS. srun and Flux set PMI_RANK and PMI_SIZE as well.
    _Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "PALS_LOCAL_RANKID", "LOCAL_WORLD_SIZE"),
    _Launcher("flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "LOCAL_WORLD_SIZE"),
    _Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def _refuse_rank_without_size(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if a launcher's variable gives a rank, but none a size."""
    for name in (*(launcher.rank for launcher in _LAUNCHERS), "PMIX_RANK"):
        # The script of an sbatch job is number 0 and no rank: only a step has a size.
        if name in environ and (name, environ[name]) != ("SLURM_PROCID", "0"):
            raise ConfigError(
                name, environ[name], f"no variable gives the number of ranks; {_SET}, or unset it"
            )


def _agreed(values: Mapping[str, int], missing: str, size: int) -> int:
    """Return the value that all variables in `values` have; ConfigError if there is none."""
    if not values:
        raise ConfigError(missing, None, f"no variable gives it to this one of {size} ranks; {_SET}")
    (name, value), *others = values.items()
    for other, found in others:
        if found != value:
            raise ConfigError(name, value, f"{other} is {found}: unset the stale one")
    return value


def _ranks_of_node(environ: Mapping[str, str], launcher: _Launcher) -> int:
    """Return the number of ranks on this node, where SLURM gives those of all nodes: "4(x2),3"."""
    name = launcher.local_size
    if launcher.name != "srun":
        return integer(environ, name, least=1)
    counts: list[str] = []
    for part in environ[name].split(","):
        match = re.fullmatch(r"([1-9]\d{0,5})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            raise ConfigError(name, environ[name], "must be numbers of tasks, such as 4(x2),3")
        counts += [match[1]] * int(match[2] or 1)
    if len(set(counts)) == 1:
        return int(counts[0])
    if "SLURM_NODEID" not in environ:
        raise ConfigError("SLURM_NODEID", None, f"is not set, and nodes have different {name}; use srun")
    return int(counts[integer(environ, "SLURM_NODEID", most=len(counts) - 1)])


def _check_nesting(
    environ: Mapping[str, str],
    launcher: _Launcher,
    own: tuple[int, int],
    outer: _Launcher,
    around: tuple[int, int],
) -> None:
    """Raise ConfigError unless `outer` can have started `launcher` once per task."""
    each, rest = divmod(own[1], around[1])
    # An mpirun in a SLURM step has one daemon per task, numbered differently; each starts at least one rank.
    # So has torchrun, which numbers its agents by the names of their hosts, n10 before n9.
    own_order = launcher.name == "mpirun" or environ.get("GROUP_WORLD_SIZE") == str(around[1])
    if each == 0 or (not own_order and (rest or own[0] // each != around[0])):
        raise ConfigError(
            f"{launcher.rank} and {launcher.size}",
            f"{own[0]} and {own[1]}",
            f"{outer.rank} and {outer.size} are {around[0]} and {around[1]}: unset the stale ones",
        )
