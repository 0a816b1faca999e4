"""The endpoint of a job's rank 0, found from a launcher's variables."""

from __future__ import annotations

import socket

import pytest

from pipelines.distributed.rendezvous import Endpoint, find_endpoint, join_store, serve_store
from pipelines.distributed.world import World
from pipelines.errors import ConfigError

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
TWO_NODES = World(1, 2, 0, 1, "srun")


def test_first_node_of_a_slurm_node_list() -> None:
    for nodes, first in (
        ("n1", "n1"),
        ("n[07-09,12],login", "n07"),
        ("r[1-3]n[4,6]-ib", "r1n4-ib"),
        ("a,b[1-2]", "a"),
    ):
        assert find_endpoint(TWO_NODES, STEP | {"SLURM_STEP_NODELIST": nodes}).address == first


def test_each_slurm_step_has_ports_of_its_own() -> None:
    one, other = (
        find_endpoint(TWO_NODES, STEP | {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_ID": step}) for step in "12"
    )
    assert one.key != other.key and one.ports != other.ports


def test_address_under_srun_can_be_set() -> None:
    environ = {"SLURM_STEP_NODELIST": "n[1-2]", "RENDEZVOUS_ADDR": "10.0.0.7", "MASTER_ADDR": "elsewhere"}
    assert find_endpoint(TWO_NODES, environ).address == "10.0.0.7"


def test_instances_have_endpoints_of_their_own() -> None:
    def find(launcher: str, environ: dict[str, str], instance: int) -> Endpoint:
        return find_endpoint(World(0, 3, 0, 3, launcher, instance, 2, 3 * instance, 3), environ)

    store = serve_store(Endpoint("127.0.0.1", (0,), "key", 10), 2)
    agents = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    torchrun = agents | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "r"}
    for launcher, environ in (("torchrun", torchrun), ("mpirun", agents | {"PMIX_NAMESPACE": "job"})):
        first, second = (find(launcher, environ, instance) for instance in range(2))
        assert first.key != second.key and first.ports != second.ports
    with pytest.raises(ConfigError) as refused:
        find("torchrun", agents, 0)
    assert refused.value.key == "--instances"


def test_ranks_without_an_address_are_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        find_endpoint(World(0, 2, 0, 2, "torchrun"), {})
    assert refused.value.key == "MASTER_ADDR"


def test_senseless_addresses_are_refused() -> None:
    two = World(0, 2, 0, 2, "torchrun")
    for port in ("0", "65536", "", "http"):
        with pytest.raises(ConfigError) as refused:
            find_endpoint(two, {"MASTER_ADDR": "n1", "MASTER_PORT": port})
        assert refused.value.key == "MASTER_PORT"
    with pytest.raises(ConfigError) as refused:
        find_endpoint(two, {"MASTER_ADDR": "", "MASTER_PORT": "29500"})
    assert refused.value.key == "MASTER_ADDR"
    with pytest.raises(ConfigError) as refused:
        find_endpoint(TWO_NODES, STEP)
    assert refused.value.key == "SLURM_STEP_NODELIST"


def test_address_of_a_hook_is_used_unless_the_user_gives_another() -> None:
    hook = STEP | {"SLURM_STEP_NODELIST": "n[1-2]", "MASTER_ADDR": "n1.cluster", "MASTER_PORT": "61100"}
    endpoint = find_endpoint(TWO_NODES, hook)
    assert (endpoint.address, endpoint.ports[0]) == ("n1.cluster", 61100)
    assert find_endpoint(TWO_NODES, hook | {"RENDEZVOUS_ADDR": "10.0.0.7"}).address == "10.0.0.7"


def test_a_port_that_another_program_uses_is_passed_over() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        endpoint = find_endpoint(World(0, 2, 0, 2, "torchrun"), environ)
        assert endpoint.ports[0] == port
        assert serve_store(endpoint, 2).port in endpoint.ports[1:]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
@pytest.mark.parametrize("address", ["::1", "127.0.0.1", "localhost"])
def test_a_store_is_reached_by_addresses_of_both_families(address: str) -> None:
    endpoint = Endpoint(address, (0,), "key", 10)
    served = serve_store(endpoint, 2)
    served.set("key", "")
    store, connection = join_store(endpoint._replace(ports=(served.port,)))
    assert store.check(["key"])
    connection.close()


def test_rank_0_listens_even_if_its_host_cannot_resolve_the_address() -> None:
    assert serve_store(Endpoint("no-such-host.invalid", (0,), "key", 10), 2).port


def test_torchrun_on_several_nodes_needs_no_name_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "name-that-only-this-host-knows")
    store = serve_store(Endpoint("localhost", (0,), "key", 10), 2)
    environ = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    assert find_endpoint(World(0, 2, 0, 1, "torchrun"), environ).address == "localhost"
