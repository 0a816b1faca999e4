"""Command lines of programs on many ranks: one-line errors, and an exit status that all ranks share."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from pipelines.distributed.session import RankError, World
from pipelines.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises a UserError where argparse would print its usage on every rank."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(f"{message}; see --help")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments in `argv`, or the process's own; it ends with one line where they make no sense."""
        with report_errors(launched()):
            return self.parse_args(argv)


def launched() -> World:
    """`World.detect()`, where what is wrong with a launcher's variables ends the process with one line."""
    with report_errors(World()):
        return World.detect()


@contextmanager
def report_errors(world: World, stopped: str = "stopped") -> Iterator[None]:
    """Leave the process with status 1 and one line where the body raises what a user can cause.

    stopped: the line for Ctrl-C, which ends it with 130.
    """
    try:
        yield
    except UserError as error:
        known = not isinstance(error, RankError)
        # A fault that all ranks know of needs telling once.
        if world.is_root or not known:
            print(f"error: {error}", file=sys.stderr, flush=True)
        world.part(str(error), known=known)
        if not known:
            world.exit_now()
        world.exit_together(1)
    except KeyboardInterrupt:
        if world.is_root:
            print(stopped, file=sys.stderr, flush=True)
        world.part(stopped, known=False)
        world.exit_now(128 + signal.SIGINT)
    except OSError as error:
        # A file system that has gone, a right that was taken away: it says which file.
        print(f"error: {RankError(world, UserError(str(error)))}", file=sys.stderr, flush=True)
        world.part(str(error), known=False)
        world.exit_now()
    except Exception as error:
        if world.size == 1:
            raise
        if _lost_contact(error):
            # Another rank has gone, and the watch finds out which.
            world.wait_for_failure_report()
            print(f"error: rank {world.rank} of {world.size}: another rank has gone", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"error: rank {world.rank} of {world.size}: {error}", file=sys.stderr)
            world.part(str(error), known=False)
        world.exit_now()


def _lost_contact(error: BaseException) -> bool:
    """Whether `error` is what a collective raises when another rank has gone."""
    import torch.distributed as dist

    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )
