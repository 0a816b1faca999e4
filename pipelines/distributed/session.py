"""Process group of the ranks: connecting, collectives, failure reports and exits.

Everything that ranks exchange, except gradients, passes through a `Session`. With one rank there is no
process group, collectives are plain calls, and torch is not imported.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from pipelines.distributed.heartbeat import (
    FailureDetector,
    HeartbeatClient,
    HeartbeatServer,
    HeartbeatTiming,
)
from pipelines.distributed.interfaces import interface, is_loopback
from pipelines.distributed.rendezvous import LOOPBACK, find_endpoint, join_store, open_store, serve_store
from pipelines.distributed.world import World
from pipelines.errors import UserError
from pipelines.filesystem import raise_open_file_limit

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

COLLECTIVE_TIMEOUT = {"nccl": timedelta(minutes=30), "gloo": timedelta(days=7)}
"""Longest wait for another rank in a collective: on the CPU a rank may convert files for days. Failed ranks
are detected by heartbeats, much earlier."""

_ROOT_ADDRESS = "root address"
"""Key of the store: the address of rank 0's host as another node sees it."""

_ROOT_MESSAGE_SECONDS = 5.0
"""Time for rank 0 to print an error that all ranks have seen, if the ranks are not connected."""

_CONNECTION_ERRORS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Texts of the RuntimeErrors that gloo raises in a collective after another rank's process has ended."""


class RankError(UserError):
    """An error that only one rank has seen, so that this rank has to report it."""

    def __init__(self, world: World, error: UserError) -> None:
        self.world, self.error = world, error
        super().__init__(f"rank {world.rank} of {world.size}: {error}" if world.size > 1 else str(error))


def exit_now(status: int, world: World) -> NoReturn:
    """End this process with `status`."""
    if world.size == 1:
        sys.exit(status)
    # Gloo's threads outlive even destroy_process_group. One that releases a tensor while the interpreter
    # shuts down aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Session:
    """Communication between the ranks of `world`; `connect` it first if there are several.

    world: this process's rank among them.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._detector: FailureDetector | None = None

    def connect(self, device: torch.device | None = None) -> None:
        """Connect all ranks: with NCCL if `device` is a GPU, else with gloo.

        Raises:
            UserError: Rank 0 cannot be reached or cannot listen.
        """
        world, cuda = self.world, device is not None and device.type == "cuda"
        if cuda:
            import torch

            torch.cuda.set_device(device)
        if world.size == 1:
            return
        timing = HeartbeatTiming.read(os.environ, world.size)
        endpoint = find_endpoint(world, os.environ)
        import torch.distributed as dist

        own = LOOPBACK

        if world.is_root:
            raise_open_file_limit(3 * world.size + 256)
            store = serve_store(endpoint, world.size)
            monitored = open_store(LOOPBACK, store.port)
            self._detector = HeartbeatServer(monitored, endpoint, world, timing)
        else:
            # If rank 0 fails, one rank of each node reports it; rank 1 may be on the node of rank 0.
            reports = world.local_rank == 0 or world.rank == 1
            try:
                monitored, connection = join_store(endpoint)
            except UserError as error:
                raise (RankError(world, error) if reports else error) from error
            self._detector = HeartbeatClient(monitored, connection, world.rank, timing, reports=reports)
            own = connection.getsockname()[0]
            store = open_store(endpoint.address, monitored.port)
            if world.rank == world.size - 1:
                # If there are several nodes, this rank is not on that of rank 0.
                store.set(_ROOT_ADDRESS, connection.getpeername()[0])
        backend = "nccl" if cuda else "gloo"
        if "GLOO_SOCKET_IFNAME" not in os.environ:
            # By itself gloo takes the address that the host's name resolves to, which others may not reach.
            # With NCCL too, groups of ranks use gloo for what is on the host.
            if is_loopback(own) and not world.single_node:
                store.set_timeout(COLLECTIVE_TIMEOUT[backend])
                own = store.get(_ROOT_ADDRESS).decode()
            if (name := interface(own)) is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = name
        dist.init_process_group(
            backend,
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=COLLECTIVE_TIMEOUT[backend],
            device_id=device if cuda else None,
        )
        if not cuda:
            # Gloo connects every two ranks. One that is connected and exits breaks the connecting of others.
            dist.barrier()

    def close(self) -> None:
        """Wait until all ranks are done, and disconnect; nothing if they are not connected."""
        if self._detector is None:
            return
        import torch.distributed as dist

        # Launchers end all ranks when the first one exits with a status other than 0.
        dist.barrier()
        self._detector.end()
        dist.destroy_process_group()

    def report_failure(self, reason: str, *, seen_by_all_ranks: bool) -> None:
        """Tell the other ranks that this one exits for `reason`, which it has printed if not seen by all."""
        if self._detector is not None:
            self._detector.report_failure(reason, seen_by_all_ranks=seen_by_all_ranks)

    def wait_for_failure_report(self) -> None:
        """After a lost connection, wait until the failure detector reports the failed rank and exits."""
        if self._detector is not None:
            self._detector.wait_for_failure_report()

    def wait_for_root_exit(self) -> None:
        """Wait until rank 0 has printed an error that all ranks have seen, and has exited.

        A launcher ends all ranks when the first one fails, before rank 0 may have printed its message.
        """
        if isinstance(self._detector, HeartbeatClient):
            self._detector.wait_for_root_exit()
        elif not self.world.is_root:
            time.sleep(_ROOT_MESSAGE_SECONDS)

    def run_on_root(self, function: Callable[[], T]) -> T:
        """Return on every rank the result of `function` on rank 0; raise its UserError on every rank."""
        if self.world.size == 1:
            return function()
        import torch.distributed as dist

        outcome: list[T | UserError | None] = [None]
        if self.world.is_root:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0)
        result = outcome[0]
        if isinstance(result, UserError):
            raise result
        return result  # type: ignore[return-value]

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """Return `function()` on every rank; if some raise a UserError, raise the first on every rank."""
        result: T | None = None
        own: UserError | None = None
        try:
            result = function()
        except UserError as error:
            own = error
        for first in self.gather(own):
            if first is not None:
                raise first
        return result  # type: ignore[return-value]

    def scatter(self, function: Callable[[], list[T]]) -> T:
        """Return this rank's item of the list that `function` returns on rank 0.

        Raises:
            UserError: `function` raised it on rank 0; every rank raises it.
        """
        items: list[T] = []
        self.run_on_root(lambda: items.extend(function()))
        if self.world.size == 1:
            return items[0]
        import torch.distributed as dist

        own: list[T | None] = [None]
        dist.scatter_object_list(own, items if self.world.is_root else None, src=0)
        return own[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, in order of ranks."""
        values = [value] * self.world.size
        if self.world.size > 1:
            import torch.distributed as dist

            dist.all_gather_object(values, value)
        return values

    def gather_to_root(self, value: T) -> list[T]:
        """Return the `value` of every rank, in order of ranks, on rank 0; an empty list on other ranks."""
        values = [value] * self.world.size if self.world.is_root else []
        if self.world.size > 1:
            import torch.distributed as dist

            dist.gather_object(value, values if self.world.is_root else None, dst=0)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place."""
        if self.world.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def tag_rank_errors(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`; turn a UserError of the iteration into a RankError of this rank."""
        with self.own_errors():
            yield from items

    @contextmanager
    def own_errors(self) -> Iterator[None]:
        """Turn a UserError in the body into a RankError of this rank."""
        try:
            yield
        except UserError as error:
            raise RankError(self.world, error) from error

    def stall_guard(self, operation: str | None) -> AbstractContextManager[None]:
        """Report `operation` of this rank if the body takes too long; None suspends an outer guard."""
        return self._detector.stall_guard(operation) if self._detector is not None else nullcontext()

    def with_stall_guard(self, items: Iterable[T], operation: str) -> Iterator[T]:
        """Yield `items`, with a `stall_guard` around the wait for each."""
        iterator = iter(items)
        while True:
            with self.stall_guard(operation):
                item = next(iterator, None)
            if item is None:
                return
            yield item


def lost_contact(error: BaseException) -> bool:
    """Return True if `error` is what a collective raises after another rank's process has ended."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(text in str(error) for text in _CONNECTION_ERRORS)
