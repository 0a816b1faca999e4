"""Ranks on different nodes that have the same place there, for what every node needs."""

from __future__ import annotations

import socket

from pipelines.dist import World
from pipelines.errors import ConfigError


class Peers:
    """The ranks that have this rank's place on their nodes, one a node, for what every node needs.

    All ranks make theirs together. ConfigError where nodes have different numbers of ranks, or
    ranks that do not stand one behind the other.
    """

    def __init__(self, world: World) -> None:
        hosts = world.gather((socket.gethostname(), world.local_size, world.local_rank))
        for rank, (host, size, place) in enumerate(hosts):
            orderly = size == world.local_size and world.size % size == 0 and place == rank % size
            if not orderly or hosts[rank - place][0] != host:
                said = f"is number {place} of {size} on {host}; start as many on every node, in a row"
                raise ConfigError("rank", rank, said)
        self._world, self._group = world, None
        if world.nodes > 1:
            import torch.distributed as dist

            for place in range(world.local_size):
                group = dist.new_group(list(range(place, world.size, world.local_size)), backend="gloo")
                if place == world.local_rank:
                    self._group = group

    def broadcast(self, content: bytes | None, node: int) -> bytes:
        """The `content` that the peer on `node` has, on all of them; theirs is None."""
        if self._world.nodes == 1:
            assert content is not None
            return content
        import torch
        import torch.distributed as dist

        source = node * self._world.local_size + self._world.local_rank
        length = torch.tensor([0 if content is None else len(content)])
        dist.broadcast(length, source, self._group)
        data = bytearray(int(length)) if content is None else bytearray(content)
        if data:
            dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), source, self._group)
        return bytes(data)
