"""Standard streams and Ctrl-C of the programs.

A package of programs calls `prepare_program` first of all, while `python -m` imports it. From then on, output
that a standard stream does not take (its terminal or reader is gone, its disk is full) is lost, and the
program continues. A program whose result is its standard output calls `check_output`.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

from pipelines.errors import AccessError, printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class OutputError(AccessError):
    """Standard output cannot be written.

    Attributes:
        reader_gone: it is a pipe whose reader has ended, as in `results | head`.
    """

    def __init__(self, error: OSError) -> None:
        remedy = "check free space, or send the output elsewhere"
        super().__init__("standard output", f"cannot be written ({error.strerror})", remedy)
        self.reader_gone = isinstance(error, BrokenPipeError)


class _Stream(io.FileIO):
    """A standard stream that drops what cannot be written.

    Attributes:
        error: the first error of a write.
    """

    error: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        """Write `data`, or drop it; return the number of bytes."""
        try:
            # None: another process has made the terminal non-blocking, and it is busy.
            while (written := super().write(data)) is None:
                select.select([], [self], [])
            return written
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


_output: _Stream | None = None


def prepare_program() -> None:
    """Set up standard streams and Ctrl-C if `python -m` is importing a program; else do nothing.

    Ctrl-C ends the process with one line and status 130, also while torch is imported, which takes seconds.
    """
    # sys.argv[0] is "-m" until the module of that option has been found.
    if sys.argv[:1] == ["-m"]:
        open_streams()
        # In a background job of a script Ctrl-C is ignored.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _exit_on_interrupt)


def open_streams() -> None:
    """Replace standard output and standard error by streams that no write of the program can fail on.

    They escape what their encoding does not have, such as bytes of a file name that are not UTF-8. A closed
    descriptor becomes /dev/null, so that no data file gets its number and with it the messages of libraries.
    """
    global _output
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number. Reading only, so that a write fails as on a closed descriptor.
            os.open(os.devnull, os.O_RDONLY)
    _output = _Stream(1, "w", closefd=False)
    sys.stdout = _text_stream(_output, sys.stdout)
    sys.stderr = _text_stream(_Stream(2, "w", closefd=False), sys.stderr)


def _text_stream(raw: _Stream, old: TextIO | None) -> io.TextIOWrapper:
    """Return a text stream on `raw` with the buffering of the stream `old`, None if that was closed."""
    by_line = isinstance(old, io.TextIOWrapper) and (old.line_buffering or old.write_through)
    encoding = old.encoding if old else "utf-8"
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=by_line)


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print `text` as one line, to standard output or `file`; it may quote names with any character."""
    print(printable(text), file=file)


def check_output() -> None:
    """Flush standard output; raise OutputError if anything printed so far is lost."""
    try:
        sys.stdout.flush()
        if _output is not None and _output.error is not None:
            raise _output.error
    except OSError as error:
        raise OutputError(error) from error


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the body at Ctrl-C; a second Ctrl-C, in the clean-up, ends the process."""
    if signal.getsignal(signal.SIGINT) is not _exit_on_interrupt:
        yield
        return
    signal.signal(signal.SIGINT, _raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _exit_on_interrupt)


def _raise_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, _exit_on_interrupt)
    raise KeyboardInterrupt


def _exit_on_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not through sys.stderr, which may be in use in the interrupted code.
    with contextlib.suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(128 + signal.SIGINT)
