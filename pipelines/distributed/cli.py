"""Command lines of programs on many ranks: argument parser, one-line errors and exit statuses."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipelines.console import OutputError, check_output, interruptible
from pipelines.distributed.session import RankError, Session, exit_now, lost_contact
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, UserError
from pipelines.storage.location import Location, parse_location
from pipelines.storage.select import storage_of

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Add its default to the help of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def location(text: str) -> Location:
    """Return the path or URL that an argument of a command line gives; for `add_argument(type=...)`."""
    try:
        return parse_location(text, "argument")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.remedy) from error


def local_path(text: str) -> Path:
    """Return the path of a file or folder that must be on a file system; see `location`."""
    found = location(text)
    if not isinstance(found, Path):
        raise argparse.ArgumentTypeError(f"{found}: must be on a file system, and this is a URL")
    return found


def target_location(text: str) -> Location:
    """Return the path or URL of a folder that is written to; see `location`."""
    found = location(text)
    if not storage_of(found).lists_folders:
        fault = f"{text}: a web server cannot be written to; give a folder, or a URL that begins with s3://"
        raise argparse.ArgumentTypeError(fault)
    return found


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises UserError where argparse would print its usage on every rank.

    Args:
        module: Name of the program's module.
        description: Text above the options.
    """

    def __init__(self, module: str, description: str | None) -> None:
        super().__init__(f"python -m {module}", description=description, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a UserError."""
        raise UserError(f"{message}; see --help")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help; raise OutputError if standard output cannot be written."""
        super().print_help(file)
        check_output()

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse `argv`, or the process's own arguments; exit with one line if they are invalid."""
        with report_errors(launched()):
            return self.parse_args(argv)


def launched() -> World:
    """Return `World.detect()`; exit with one line if the launcher's variables are invalid.

    Warnings about the file system are logged on rank 0 alone.
    """
    with report_errors(World()):
        world = World.detect()
        if not world.is_root:
            logging.getLogger("pipelines").setLevel(logging.ERROR)
        return world


@contextmanager
def report_errors(world: World, stopped: str = "stopped") -> Iterator[Session]:
    """Run the body in a `Session` of `world`; print errors as one line and exit.

    An error that a user can cause ends the process with status 1, Ctrl-C with 130, and a pipe closed before
    it has taken the result with 141, as SIGPIPE would. Of an error that all ranks have seen, rank 0 prints
    the line. With one rank, other exceptions pass through.

    Args:
        world: The ranks that run this program.
        stopped: The line to print for Ctrl-C.

    Yields:
        The session, which is not connected yet; it is closed after the body.
    """
    session = Session(world)
    try:
        with interruptible():
            yield session
            session.close()
    except OutputError as error:
        # The result is printed last, by rank 0: the other ranks wait for it to close.
        session.close()
        if not error.reader_gone:
            print(f"error: {error}", file=sys.stderr)
        exit_now(128 + signal.SIGPIPE if error.reader_gone else 1, world)
    except UserError as error:
        seen_by_all = not isinstance(error, RankError)
        if world.is_root or not seen_by_all:
            print(f"error: {error}", file=sys.stderr, flush=True)
        session.report_failure(str(error), seen_by_all_ranks=seen_by_all)
        if seen_by_all:
            session.wait_for_root_exit()
        exit_now(1, world)
    except KeyboardInterrupt:
        if world.is_root:
            print(stopped, file=sys.stderr, flush=True)
        session.report_failure(stopped, seen_by_all_ranks=False)
        exit_now(128 + signal.SIGINT, world)
    except OSError as error:
        # A file system that is gone, or a permission that was revoked.
        text = f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error)
        print(f"error: {RankError(world, UserError(text))}", file=sys.stderr, flush=True)
        session.report_failure(text, seen_by_all_ranks=False)
        exit_now(1, world)
    except Exception as error:
        if world.size == 1:
            raise
        if lost_contact(error):
            session.wait_for_failure_report()
            print(f"error: {RankError(world, UserError('lost contact with another rank'))}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"error: {RankError(world, UserError(str(error)))}", file=sys.stderr)
            session.report_failure(str(error), seen_by_all_ranks=False)
        exit_now(1, world)
