"""Nodes with different numbers of ranks, and ranks that are not numbered node by node."""

from __future__ import annotations

import pytest

from pipelines.distributed.node_groups import NodeGroup, check_nodes
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.errors import ConfigError


def gathered(monkeypatch: pytest.MonkeyPatch, world: World, values: list[object]) -> Session:
    """Return a session of `world` in which ranks gather `values`."""
    monkeypatch.setattr(Session, "gather", lambda *_: values)
    return Session(world)


def test_nodes_with_different_numbers_of_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_nodes(gathered(monkeypatch, World(1, 4, 1, 2), [2, 2, 2, 2]))
    # Rank 0 and another rank come to the same error: nodes of 2, 1 and 1 ranks, and of 4 where there are 6.
    for sizes, rank in (([2, 2, 1, 1], 2), ([4] * 6, 0)):
        for world in (World(0, len(sizes), 0, sizes[0]), World(3, len(sizes), 0, sizes[3])):
            with pytest.raises(ConfigError, match="start equally many on every node") as refused:
                check_nodes(gathered(monkeypatch, world, list(sizes)))
            assert (refused.value.key, refused.value.value) == ("rank", rank)


def test_groups_need_ranks_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dealt to two nodes in turn; both ranks counted on each of two nodes.
    cyclic: list[object] = [("a", 2, 0), ("b", 2, 0), ("a", 2, 1), ("b", 2, 1)]
    for world, hosts, rank in (
        (World(0, 4, 0, 2), cyclic, 1),
        (World(0, 2, 0, 2), [("a", 2, 0), ("b", 2, 1)], 1),
    ):
        with pytest.raises(ConfigError, match="numbered node by node") as refused:
            NodeGroup(gathered(monkeypatch, world, list(hosts)), [[0], [1]])
        assert (refused.value.key, refused.value.value) == ("rank", rank)
