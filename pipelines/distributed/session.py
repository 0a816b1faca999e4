"""The world of ranks: who we are, how we meet, and the few things we ever say to each other.

A launcher (mpirun, torchrun, srun, or none) starts one process for each device and tells each one
its place in environment variables, which `pipelines.distributed.environment` reads. Everything
that crosses ranks, but for the gradients, goes through a `World`; with one rank it is plain
arithmetic, no process group exists, and torch, which takes its time to import, is left out.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from pipelines.distributed.environment import place_in
from pipelines.distributed.member import Member
from pipelines.distributed.rendezvous import meeting_place, open_store
from pipelines.distributed.warden import Warden
from pipelines.distributed.watch import Watch
from pipelines.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_TIMEOUT = {"nccl": timedelta(minutes=30), "gloo": timedelta(days=7)}
"""How long a rank waits for the others: long enough for rank 0 to simulate a data set, and on the CPU for one
that converts the slowest part of it; who has gone or is silent the watch tells at once."""

_GRACE_SECONDS = 5.0
"""How long ranks that never met let rank 0 speak, before they leave for what all of them know."""

_watch: Watch | None = None
"""Of this process, from when its ranks are connected."""


def available_cores() -> int:
    """Cores that this process may run on: those a launcher has bound it to, or all."""
    return len(os.sched_getaffinity(0))


class RankError(UserError):
    """A fault that only one rank has seen, so that this rank must be the one to tell of it."""

    def __init__(self, world: World, error: UserError) -> None:
        self.world, self.error = world, error
        super().__init__(f"rank {world.rank} of {world.size}: {error}" if world.size > 1 else str(error))

    def __reduce__(self) -> tuple[type[RankError], tuple[World, UserError]]:
        return type(self), (self.world, self.error)


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all of them.

    rank, size: place and number of processes in the whole run.
    local_rank, local_size: the same on this node; `local_rank` picks the GPU.
    launcher: "torchrun", "mpirun", "srun" or "none".
    model, models: which of how many worlds this is that the job's ranks were split into.
    before, beside: ranks of other models on this node: those that stand before this one's, and all.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"
    model: int = 0
    models: int = 1
    before: int = 0
    beside: int = 0

    @staticmethod
    def detect(environ: Mapping[str, str] = os.environ) -> World:
        """The world that the launcher's variables in `environ` describe; alone without any."""
        place = place_in(environ)
        return World() if place is None else World(*place)

    def split(self, models: int) -> World:
        """This rank's world where all ranks are split into `models` worlds, ranks in a row.

        ConfigError unless each has as many ranks, on whole nodes or in whole parts of one.
        """
        if models == 1:
            return self
        if models < 1 or self.size % models:
            raise ConfigError("--instances", models, f"does not share out the {self.size} ranks")
        if self.launcher == "srun":
            raise ConfigError("--instances", models, "is not for srun, where run.sub has NUM_INSTANCES=N")
        each = self.size // models
        local = min(each, self.local_size)
        if each % local or self.local_size % local:
            said = f"gives each {each} ranks, which do not fit nodes of {self.local_size}"
            raise ConfigError("--instances", models, said)
        place = self.local_rank % local
        return World(
            self.rank % each,
            each,
            place,
            local,
            self.launcher,
            model=self.rank // each,
            models=models,
            before=self.local_rank - place,
            beside=self.local_size - local,
        )

    @property
    def cores(self) -> int:
        """Cores for this rank: those that the launcher has bound it to, or its share of the node's."""
        cores, ranks = available_cores(), self.local_size + self.beside
        return max(1, cores // ranks if cores >= ranks else 1)

    @property
    def nodes(self) -> int:
        """How many nodes there are; each has `local_size` ranks, numbered consecutively."""
        return max(1, self.size // self.local_size)

    @property
    def node(self) -> int:
        """The number of this rank's node."""
        return self.rank // self.local_size

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which writes the logs."""
        return self.rank == 0

    def device(self, kind: str) -> torch.device:
        """This rank's device of `kind` "auto", "cpu" or "cuda"; ConfigError where it is not there."""
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if kind == "cpu" or (kind == "auto" and gpus == 0):
            return torch.device("cpu")
        if gpus == 0:
            raise ConfigError("device", kind, "no GPU is visible here; use device: cpu or auto")
        if gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
            # Somebody has given each rank a GPU of its own, the only one that it sees.
            return torch.device("cuda", 0)
        index = self.before + self.local_rank
        if index >= gpus:
            raise ConfigError(
                "device",
                kind,
                f"{self.local_size + self.beside} ranks on this node but {gpus} GPUs; start one rank a GPU",
            )
        return torch.device("cuda", index)

    @contextmanager
    def connected(self, device: torch.device | None = None) -> Iterator[None]:
        """The process group of these ranks: NCCL for `device` cuda, and gloo for cpu or none."""
        cuda = device is not None and device.type == "cuda"
        if cuda:
            import torch

            torch.cuda.set_device(device)
        if self.size == 1:
            yield
            return
        one_node = self.local_size == self.size
        meeting = meeting_place(
            self.launcher,
            os.environ,
            rank=self.rank,
            size=self.size,
            one_node=one_node,
            model=self.model,
            models=self.models,
        )
        if one_node and "lo" in (name for _, name in socket.if_nameindex()):
            # One node: gloo need not find out which of its interfaces others can reach.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        global _watch
        # Before torch comes, which takes its time: a rank that dies meanwhile is missed at once.
        if self.is_root:
            _watch = warden = Warden(meeting, self.size)
        else:
            # Where rank 0 has gone, one rank a node says so.
            speaks = self.local_rank == (1 if self.node == 0 else 0)
            try:
                _watch = member = Member(meeting, self.rank, self.size, speaks=speaks)
            except UserError as error:
                raise (RankError(self, error) if speaks else error) from error
        import torch
        import torch.distributed as dist

        if self.is_root:
            store = open_store(meeting.address, 0, serves=True, size=self.size, seconds=meeting.seconds)
            warden.begin(str(store.port))
        else:
            port = int(member.begin())
            store = open_store(meeting.address, port, size=self.size, seconds=meeting.seconds)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT[backend],
            device_id=device if cuda else None,
        )
        if not cuda:
            # Gloo connects every two ranks. One that has all of its own and leaves breaks others' connecting.
            dist.barrier()
        yield
        # Left out on an error on purpose: there the peers may be gone, and waiting for them hangs.
        dist.destroy_process_group()
        _watch.end()

    def exit_together(self, status: int) -> NoReturn:
        """End this process with `status`, which all ranks end with; rank 0 has told the reason of a fault."""
        if _watch is None:
            if status != 0 and not self.is_root:
                time.sleep(_GRACE_SECONDS)
        elif status == 0:
            _watch.end()
        else:
            # A launcher ends all ranks when the first one fails, whatever they were about to say.
            _watch.outlast_root()
        self._exit(status)

    def exit_now(self, status: int = 1) -> NoReturn:
        """End this process with `status`, for a reason that this rank has told."""
        self._exit(status)

    def part(self, reason: str, *, known: bool) -> None:
        """Tell the others that this rank leaves, for a `reason` that it has told; all may have `known` it."""
        if _watch is not None:
            _watch.part(reason, known=known)

    def wait_for_failure_report(self) -> None:
        """Where another rank has gone: give the watch the time to find out which, and say so."""
        if _watch is not None:
            _watch.await_word()

    def _exit(self, status: int) -> NoReturn:
        if self.size == 1:
            sys.exit(status)
        # Where ranks have met, gloo's threads are still there: they outlive even destroy_process_group.
        # One that lets go of a tensor while the interpreter tidies up aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def run_on_root(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; a UserError there is raised on every rank."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        outcome: list[T | UserError | None] = [None]
        if self.is_root:
            try:
                outcome[0] = make()
            except UserError as error:
                outcome[0] = error
        dist.broadcast_object_list(outcome, src=0)
        result = outcome[0]
        if isinstance(result, UserError):
            raise result
        return result  # type: ignore[return-value]

    def run_on_all_ranks(self, make: Callable[[], T]) -> T:
        """`make()` on every rank; if it raises a UserError on any, every rank raises the first of them."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        result: T | None = None
        mine: UserError | None = None
        try:
            result = make()
        except UserError as error:
            mine = error
        errors: list[UserError | None] = [None] * self.size
        dist.all_gather_object(errors, mine)
        for first in errors:
            if first is not None:
                raise first
        return result  # type: ignore[return-value]

    def scatter(self, make: Callable[[], list[T]]) -> T:
        """What `make` returns on rank 0 for this rank, by rank; a UserError there is raised on every rank."""
        shares: list[T] = []
        self.run_on_root(lambda: shares.extend(make()))
        if self.size == 1:
            return shares[0]
        import torch.distributed as dist

        mine: list[T | None] = [None]
        dist.scatter_object_list(mine, shares if self.is_root else None, src=0)
        return mine[0]  # type: ignore[return-value]

    def gather_to_root(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on rank 0; nothing on the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[T] = [value] * self.size if self.is_root else []
        dist.gather_object(value, values if self.is_root else None, dst=0)
        return values

    def tag_rank_errors(self, items: Iterable[T]) -> Iterator[T]:
        """`items`; a UserError among them is one that only this rank knows of, and is raised as such."""
        try:
            yield from items
        except UserError as error:
            raise RankError(self, error) from error

    def with_stall_guard(self, items: Iterable[T], what: str) -> Iterator[T]:
        """`items`, each of which ought to come soon; a rank that is stuck at one is told of as `what`."""
        iterator = iter(items)
        while True:
            with self.stall_guard(what):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def stall_guard(self, what: str) -> AbstractContextManager[None]:
        """While the body runs this rank is about `what`, which the watch tells of if it takes too long."""
        return _watch.busy(what) if _watch is not None else nullcontext()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values
