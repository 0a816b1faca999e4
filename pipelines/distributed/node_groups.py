"""Ranks on different nodes that have the same place there, for what several nodes need."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from pipelines.distributed.session import World
from pipelines.errors import ConfigError


class Peers:
    """The ranks that have this rank's place on the nodes of its team, one of `teams`, which have all nodes.

    All ranks make theirs together. ConfigError where nodes have different numbers of ranks, or
    ranks that are not numbered consecutively.

    number: of this rank's team. teams: how many there are. size: nodes in each.
    place: this rank's node in its team.
    """

    def __init__(self, world: World, teams: Sequence[Sequence[int]]) -> None:
        hosts = world.gather((socket.gethostname(), world.local_size, world.local_rank))
        for rank, (host, size, place) in enumerate(hosts):
            orderly = size == world.local_size and world.size % size == 0 and place == rank % size
            if not orderly or hosts[rank - place][0] != host:
                said = f"is number {place} of {size} on {host}; start as many on every node, in a row"
                raise ConfigError("rank", rank, said)
        self.teams = len(teams)
        self.number = next(number for number, team in enumerate(teams) if world.node in team)
        own = teams[self.number]
        self.size, self.place = len(own), own.index(world.node)
        self._ranks = _ranks(world, own, world.local_rank)
        self._group = None
        if self.size > 1:
            import torch.distributed as dist

            # Every rank has to know of every group.
            for team in teams:
                for local_rank in range(world.local_size):
                    ranks = _ranks(world, team, local_rank)
                    group = dist.new_group(ranks, backend="gloo")
                    if ranks == self._ranks:
                        self._group = group

    def broadcast(self, content: bytes | None, place: int) -> bytes:
        """The `content` that the peer at `place` has, on all of them; theirs is None."""
        if self.size == 1:
            assert content is not None
            return content
        import torch
        import torch.distributed as dist

        source = self._ranks[place]
        length = torch.tensor([0 if content is None else len(content)])
        dist.broadcast(length, source, self._group)
        data = bytearray(int(length)) if content is None else bytearray(content)
        if data:
            dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), source, self._group)
        return bytes(data)


def _ranks(world: World, team: Sequence[int], local_rank: int) -> list[int]:
    """The ranks with the place `local_rank` on the nodes of `team`."""
    return [node * world.local_size + local_rank for node in team]
