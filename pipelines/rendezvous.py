"""Where the ranks first meet: an address and a port that all of them come to know."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping

from pipelines.errors import ConfigError


def integer(environ: Mapping[str, str], name: str) -> int:
    """The whole number in the variable `name`, 0 without it; ConfigError for anything else."""
    text = environ.get(name, "0")
    if not text.isdecimal():
        raise ConfigError(name, text, "a launcher sets this to a whole number, at least 0")
    return int(text)


def meeting_place(
    launcher: str, environ: Mapping[str, str], *, rank: int, size: int, one_node: bool
) -> tuple[str, int]:
    """The address and port at which the `size` ranks that `launcher` has started meet rank 0.

    Called by all of them; `one_node` says that they are on one. ConfigError where it is not to be found.
    """
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return environ["MASTER_ADDR"], integer(environ, "MASTER_PORT")
    if launcher == "mpirun":
        return _by_mpi(rank, size, one_node)
    if launcher == "srun":
        nodes = environ["SLURM_STEP_NODELIST"]
        first = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
        ).stdout.split()[0]
        # Steps of one job may share a node, so both numbers choose the port.
        step = 1000 * integer(environ, "SLURM_JOB_ID") + integer(environ, "SLURM_STEP_ID")
        return first, 20000 + step % 40000
    raise ConfigError(
        "MASTER_ADDR",
        None,
        f"{size} ranks by {launcher}: set MASTER_ADDR and MASTER_PORT",
    )


def _by_mpi(rank: int, size: int, one_node: bool) -> tuple[str, int]:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            "mpi4py",
            None,
            f"mpirun started {size} ranks, but mpi4py is missing: pip install mpi4py",
        ) from error
    if MPI.COMM_WORLD.size != size:
        raise ConfigError(
            "mpi4py",
            MPI.COMM_WORLD.size,
            f"mpirun started {size} ranks, so mpi4py was built for another MPI than this mpirun",
        )
    meeting = None
    if rank == 0:
        host = "127.0.0.1" if one_node else socket.getfqdn()
        with socket.socket() as probe:
            probe.bind(("", 0))
            meeting = host, probe.getsockname()[1]
    meeting = MPI.COMM_WORLD.bcast(meeting)
    # MPI has done its part. Finalising at exit would make a rank that fails wait for the others,
    # who wait for it.
    MPI.Finalize()
    return meeting
