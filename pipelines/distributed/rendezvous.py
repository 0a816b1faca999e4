"""Rendezvous: the address and the ports at which rank 0 can be reached, found from a launcher's variables."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswerError
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from pipelines.distributed.environment import integer
from pipelines.distributed.interfaces import is_loopback
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

LOOPBACK = "127.0.0.1"

_FIRST_PORT, _PORTS, _ATTEMPTS = 20000, 12000, 8
"""Ports that no system assigns by itself. If one is in use, the next ones are tried."""


_LAST_PORT = 65535

_ANSWER_TIMEOUT = 30.0
"""Seconds for the program at a port to answer as a store does, which includes a DNS query of its address."""


class Endpoint(NamedTuple):
    """Address and ports of rank 0.

    address: of rank 0.
    ports: on which it may listen, in the order to try.
    key: distinguishes this run from another one that uses the same port.
    timeout: seconds to wait for the next rank to connect.
    """

    address: str
    ports: tuple[int, ...]
    key: str
    timeout: float


def find_endpoint(world: World, environ: Mapping[str, str]) -> Endpoint:
    """Return the endpoint of `world`; all of its ranks call this.

    Environment variables: RENDEZVOUS_TIMEOUT, seconds to wait for the next rank to connect; RENDEZVOUS_ADDR,
    the address of rank 0 under srun, if the name of the step's first node cannot be resolved.

    Raises:
        ConfigError: The launcher's variables give no address.
    """
    timeout = float(integer(environ, "RENDEZVOUS_TIMEOUT", 40))
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _by_torchrun(world, environ, timeout)
    given = environ.get("MASTER_ADDR") and "MASTER_PORT" in environ
    # A hook of the container may have set MASTER_ADDR; RENDEZVOUS_ADDR is the user's.
    named = world.launcher == "srun" and environ.get("RENDEZVOUS_ADDR")
    if given and not named and world.num_instances == 1:
        address, port = environ["MASTER_ADDR"], _master_port(environ)
        # Launchers choose the port by arithmetic, without testing it.
        ports = range(port, min(port + _ATTEMPTS, _LAST_PORT + 1))
        return Endpoint(address, tuple(ports), f"{address}:{port}", timeout)
    if world.launcher == "srun":
        # Steps of one job may share a node, so the ports depend on both numbers.
        key = f"slurm {environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
        address = environ.get("RENDEZVOUS_ADDR") or (LOOPBACK if world.single_node else _first_node(environ))
        return Endpoint(address, _ports(key), key, timeout)
    if world.launcher == "mpirun":
        if not world.single_node or "PMIX_NAMESPACE" not in environ:
            return _by_mpi(world, timeout)
        key = f"pmix {environ['PMIX_NAMESPACE']} {world.instance}"
        return Endpoint(LOOPBACK, _ports(key), key, timeout)
    if world.num_instances > 1:
        raise ConfigError("--instances", world.num_instances, "needs mpirun or torchrun as launcher")
    fault = f"{world.size} ranks started by {world.launcher}: set MASTER_ADDR and MASTER_PORT"
    raise ConfigError("MASTER_ADDR", None, fault)


def serve_store(endpoint: Endpoint, size: int) -> TCPStore:
    """Host the key-value store of `size` ranks at the first free port of `endpoint`.

    Raises:
        UserError: No port is free.
    """
    local = endpoint.address == LOOPBACK
    both = not local and socket.has_dualstack_ipv6()
    for port in endpoint.ports:
        try:
            listener = socket.create_server(
                (LOOPBACK if local else "", port),
                family=socket.AF_INET6 if both else socket.AF_INET,
                backlog=2 * size,
                dualstack_ipv6=both,
            )
        except OSError as error:
            fault = str(error)
        else:
            # The address may be one that only other hosts can resolve or reach.
            return open_store(LOOPBACK, port, listener)
    raise UserError(
        f"rank 0 cannot listen at port {endpoint.ports[-1]} ({fault}); does another run use it? "
        "Set MASTER_PORT to another"
    )


def join_store(endpoint: Endpoint) -> tuple[TCPStore, socket.socket]:
    """Connect to the store of rank 0; return it and an idle connection, which closes when rank 0 ends.

    Raises:
        UserError: Rank 0 cannot be reached within the endpoint's timeout.
    """
    deadline, fault = time.monotonic() + endpoint.timeout, ""
    while time.monotonic() < deadline:
        for port in endpoint.ports:
            try:
                connection = socket.create_connection((endpoint.address, port), _ANSWER_TIMEOUT)
                store = open_store(endpoint.address, port)
                if store.check([endpoint.key]):
                    return store, connection
                fault = "another program listens there"
            except (OSError, RuntimeError, NoAnswerError) as error:
                fault = str(error).partition("\n")[0] or "no answer"
        time.sleep(0.2)
    ports = "-".join(map(str, sorted({endpoint.ports[0], endpoint.ports[-1]})))
    raise UserError(
        f"cannot reach rank 0 at {endpoint.address}, port {ports}, within {endpoint.timeout:g} s ({fault}); "
        "did it start, and can this node reach that one?"
    )


def open_store(address: str, port: int, listener: socket.socket | None = None) -> TCPStore:
    """Connect to the store at `address` and `port`, or host it there, with `listener`.

    Raises:
        RuntimeError: Nothing listens there, or it is no store.
        NoAnswerError: The program there does not answer.
    """
    import torch.distributed as dist

    opened: Future[TCPStore] = Future()

    def connect() -> None:
        try:
            file = None if listener is None else listener.detach()
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address, port, is_master=file is not None, wait_for_workers=False, master_listen_fd=file
            )
            opened.set_result(store)
        except RuntimeError as error:
            opened.set_exception(error)

    # The constructor waits without a limit for the answer of a program that is no store.
    threading.Thread(target=connect, daemon=True).start()
    return opened.result(_ANSWER_TIMEOUT)


def _master_port(environ: Mapping[str, str]) -> int:
    return integer(environ, "MASTER_PORT", least=1, most=_LAST_PORT)


def _ports(key: str) -> tuple[int, ...]:
    first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return tuple(_FIRST_PORT + (first + attempt) % _PORTS for attempt in range(_ATTEMPTS))


def _first_node(environ: Mapping[str, str]) -> str:
    """Return the first node of a list such as "rack[1-3]n[07,9],login2", without scontrol."""
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes)
    if first is None:
        raise ConfigError("SLURM_STEP_NODELIST", nodes, "names no node; set RENDEZVOUS_ADDR")
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _reachable_address(address: str, port: int) -> str:
    """Return an address of this host for the hosts that reach `address`, where something listens at `port`.

    If `address` is that of this host, it is the one; the host's name may be one that others cannot resolve.
    """
    with socket.create_connection((address, port), _ANSWER_TIMEOUT) as connection:
        own = str(connection.getsockname()[0])
    return address if is_loopback(own) else own


def _by_torchrun(world: World, environ: Mapping[str, str], timeout: float) -> Endpoint:
    """Exchange the endpoint through the store of torchrun's agents, which occupies MASTER_PORT."""
    agents = environ["MASTER_ADDR"], _master_port(environ)
    store = open_store(*agents)
    store.set_timeout(timedelta(seconds=timeout))
    # The store outlives the ranks: after a restart they need an endpoint of their own.
    run, attempt = (environ.get(f"TORCHELASTIC_{name}") for name in ("RUN_ID", "RESTART_COUNT"))
    key = f"rendezvous/{run}/{attempt}/{world.instance}"
    if world.is_root:
        own = LOOPBACK if world.single_node else _reachable_address(*agents)
        store.set(key, f"{own} {_free_port()}")
    address, port = store.get(key).decode().split()
    return Endpoint(address, (int(port),), key, timeout)


def _by_mpi(world: World, timeout: float) -> Endpoint:
    """Exchange the endpoint through MPI."""
    try:
        from mpi4py import rc

        rc.initialize = False
        from mpi4py import MPI
    except ImportError as error:
        fault = f"mpirun started {world.size} ranks, but mpi4py is missing: pip install mpi4py"
        raise ConfigError("mpi4py", None, fault) from error
    # MPI waits without a limit for a rank that does not start, and reports nothing.
    alarm = threading.Timer(timeout, _give_up, (world, timeout))
    alarm.daemon = True
    alarm.start()
    MPI.Init()
    started = world.size * world.num_instances
    if MPI.COMM_WORLD.size != started:
        fault = f"mpirun started {started} ranks, so mpi4py was built for another MPI than this mpirun"
        raise ConfigError("mpi4py", MPI.COMM_WORLD.size, fault)
    host = LOOPBACK if world.single_node else socket.getfqdn()
    addresses = MPI.COMM_WORLD.allgather((host, _free_port()) if world.is_root else None)
    address, port = addresses[world.instance * world.size]
    alarm.cancel()
    # MPI is not used after this. To finalise it at exit would make a rank that fails wait for the others,
    # which wait for it.
    MPI.Finalize()
    return Endpoint(address, (port,), f"{address}:{port}", timeout)


def _give_up(world: World, timeout: float) -> None:
    message = f"error: rank {world.rank} of {world.size}: not all ranks called MPI_Init within {timeout:g} s"
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())
    os._exit(1)
