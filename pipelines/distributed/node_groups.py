"""Communication between ranks of different nodes, for staging: one rank of each node in a group."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from pipelines.distributed.session import Session
from pipelines.distributed.world import IN_ORDER
from pipelines.errors import ConfigError


def check_nodes(session: Session) -> None:
    """Raise ConfigError on all ranks unless every node has equally many; all ranks call this."""
    sizes = session.gather(session.world.local_size)
    for rank, size in enumerate(sizes):
        if size != sizes[0] or len(sizes) % size:
            fault = f"is one of {size} on its node, rank 0 one of {sizes[0]}, of {len(sizes)} in all; "
            raise ConfigError("rank", rank, fault + "start equally many on every node")


class NodeGroup:
    """The ranks with this rank's local rank on all nodes of its group; every node belongs to one group.

    All ranks create theirs together.

    number: of this rank's group.
    num_groups: number of groups.
    size: number of nodes in each group.
    group_rank: position of this rank's node in its group.

    Raises:
        ConfigError: Nodes have different numbers of ranks, or ranks are not numbered node by node.
    """

    def __init__(self, session: Session, groups: Sequence[Sequence[int]]) -> None:
        world = session.world
        hosts = session.gather((socket.gethostname(), world.local_size, world.local_rank))
        for rank, (host, size, local_rank) in enumerate(hosts):
            in_order = size == world.local_size and world.size % size == 0 and local_rank == rank % size
            if not in_order or hosts[rank - local_rank][0] != host:
                raise ConfigError("rank", rank, f"is number {local_rank} of {size} on {host}; {IN_ORDER}")
        self.num_groups = len(groups)
        self.number = next(number for number, group in enumerate(groups) if world.node in group)
        self.size = len(groups[self.number])
        self.group_rank = groups[self.number].index(world.node)
        self._process_group = None
        if self.size > 1:
            import torch.distributed as dist

            # Every rank has to create every process group.
            for number, group in enumerate(groups):
                for local_rank in range(world.local_size):
                    ranks = [node * world.local_size + local_rank for node in group]
                    created = dist.new_group(ranks, backend="gloo")
                    if (number, local_rank) == (self.number, world.local_rank):
                        self._process_group = created

    def broadcast(self, content: bytes | None, source: int) -> bytes:
        """Return on all ranks of the group the `content` of group rank `source`; None on the others."""
        if self.size == 1:
            assert content is not None
            return content
        import torch
        import torch.distributed as dist

        length = torch.tensor([0 if content is None else len(content)])
        dist.broadcast(length, group=self._process_group, group_src=source)
        data = bytearray(int(length)) if content is None else bytearray(content)
        if data:
            tensor = torch.frombuffer(data, dtype=torch.uint8)
            dist.broadcast(tensor, group=self._process_group, group_src=source)
        return bytes(data)
