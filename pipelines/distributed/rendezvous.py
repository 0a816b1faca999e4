"""Where the ranks first meet: an address, the ports to try there, and a word to know each other by."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

PATIENCE = "MEETING_SECONDS"
"""The variable that says how long ranks wait for the next one to come to the meeting."""

ADDRESS = "MEETING_ADDRESS"
"""The variable that says where rank 0 is, under srun where the name of a step's first node leads nowhere."""

_FIRST_PORT, _PORTS, _TRIES = 20000, 12000, 8
"""Ports that no system gives out by itself; where one is taken, the next ones are tried."""


class Meeting(NamedTuple):
    """Where ranks meet.

    address: of rank 0. ports: where it may listen, in the order to try.
    key: tells this run's ranks from those of another that come to the wrong door.
    seconds: how long to wait for the next rank to come.
    """

    address: str
    ports: tuple[int, ...]
    key: str
    seconds: float


def integer(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    """The whole number in the variable `name`, `default` without it; ConfigError for anything else."""
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(name, text, "must be a whole number, at least 0")
    return int(text)


def meeting_place(
    launcher: str,
    environ: Mapping[str, str],
    *,
    rank: int,
    size: int,
    one_node: bool,
    model: int = 0,
    models: int = 1,
) -> Meeting:
    """Where the `size` ranks of one of the `models` that `launcher` has started meet.

    Called by all of them; `one_node` says that they are on one. ConfigError where it is not to be found.
    """
    seconds = float(integer(environ, PATIENCE, 40))
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _by_torchrun(environ, rank, one_node, model, seconds)
    if models == 1 and "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        address, port = environ["MASTER_ADDR"], integer(environ, "MASTER_PORT")
        return Meeting(address, (port,), f"{address}:{port}", seconds)
    if launcher == "srun":
        # Steps of one job may share a node, so both numbers choose the ports.
        key = f"slurm {environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
        address = environ.get(ADDRESS) or ("127.0.0.1" if one_node else _first_node(environ))
        return Meeting(address, _ports(key), key, seconds)
    if launcher == "mpirun" and one_node and "PMIX_NAMESPACE" in environ:
        key = f"pmix {environ['PMIX_NAMESPACE']} {model}"
        return Meeting("127.0.0.1", _ports(key), key, seconds)
    if launcher == "mpirun":
        return _by_mpi(rank, size, one_node, model, models, seconds)
    if models > 1:
        raise ConfigError(
            "--instances", models, "is for mpirun and torchrun, which show each model its own place"
        )
    raise ConfigError(
        "MASTER_ADDR",
        None,
        f"{size} ranks by {launcher}: set MASTER_ADDR and MASTER_PORT",
    )


def open_store(
    address: str, port: int, *, serves: bool = False, size: int | None = None, seconds: float
) -> TCPStore:
    """A key-value store of torch for `size` ranks at `address` and `port`; `serves` it, at any port for 0.

    Asking it takes `seconds` at most.
    """
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, size, serves, timedelta(seconds=seconds), wait_for_workers=False
    )


def _ports(key: str) -> tuple[int, ...]:
    first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return tuple(_FIRST_PORT + (first + attempt) % _PORTS for attempt in range(_TRIES))


def _first_node(environ: Mapping[str, str]) -> str:
    """The first node of SLURM's short form, "rack[1-3]n[07,9],login2"; a container has no scontrol to ask."""
    nodes = environ["SLURM_STEP_NODELIST"]
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes)
    if first is None:
        raise ConfigError("SLURM_STEP_NODELIST", nodes, "names no node; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _by_torchrun(
    environ: Mapping[str, str], rank: int, one_node: bool, model: int, seconds: float
) -> Meeting:
    """Through the store of torchrun's agents, which hold MASTER_PORT themselves."""
    store = open_store(environ["MASTER_ADDR"], integer(environ, "MASTER_PORT"), seconds=seconds)
    # The store outlives the ranks: after a restart they meet anew.
    run, attempt = (environ.get(f"TORCHELASTIC_{what}") for what in ("RUN_ID", "RESTART_COUNT"))
    name = f"meeting/{run}/{attempt}/{model}"
    if rank == 0:
        host = "127.0.0.1" if one_node else socket.getfqdn()
        store.set(name, f"{host} {_free_port()}")
    address, port = store.get(name).decode().split()
    return Meeting(address, (int(port),), name, seconds)


def _by_mpi(rank: int, size: int, one_node: bool, model: int, models: int, seconds: float) -> Meeting:
    try:
        from mpi4py import rc

        rc.initialize = False
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            "mpi4py",
            None,
            f"mpirun started {size} ranks, but mpi4py is missing: pip install mpi4py",
        ) from error
    # MPI waits for a rank that never comes for ever, and says nothing.
    alarm = threading.Timer(seconds, _give_up, (rank, size, seconds))
    alarm.daemon = True
    alarm.start()
    MPI.Init()
    if MPI.COMM_WORLD.size != size * models:
        raise ConfigError(
            "mpi4py",
            MPI.COMM_WORLD.size,
            f"mpirun started {size * models} ranks, so mpi4py was built for another MPI than this mpirun",
        )
    meeting = None
    if rank == 0:
        meeting = "127.0.0.1" if one_node else socket.getfqdn(), _free_port()
    address, port = MPI.COMM_WORLD.allgather(meeting)[model * size]
    alarm.cancel()
    # MPI has done its part. Finalising at exit would make a rank that fails wait for the others,
    # who wait for it.
    MPI.Finalize()
    return Meeting(address, (port,), f"{address}:{port}", seconds)


def _give_up(rank: int, size: int, seconds: float) -> None:
    message = f"error: rank {rank} of {size}: not all ranks have come to MPI within {seconds:g} s; leaving"
    os.write(2, f"{message}\n".encode())
    os._exit(1)
