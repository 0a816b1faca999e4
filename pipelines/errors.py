"""Errors that a user can fix, as one line: the thing, its value, the reason and the remedy.

Programs catch `UserError` in `main`, print it without a traceback and exit with 1. Any other
exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from typing import Any

MAX_CONSECUTIVE_BAD = 16
"""Consecutive damaged or unreadable files after which a program stops: so many are no accident."""


def printable(text: str) -> str:
    """Return `text` as one line, with line breaks, control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """An error that the user can fix; `str(error)` is one line."""

    def __str__(self) -> str:
        # Names of files, which messages quote, may contain any character.
        return printable(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors are sent between ranks and worker processes. The default would call `__init__` with the line.
        return type(self).__new__, (type(self), *self.args), vars(self)


class DataError(UserError):
    """A file or folder that cannot be used: `<path>: <fault>; <remedy>`."""

    def __init__(self, path: str | os.PathLike[str], fault: str, remedy: str) -> None:
        self.path, self.fault, self.remedy = os.fspath(path), fault, remedy
        super().__init__(f"{self.path}: {fault}; {remedy}")


class StorageError(UserError):
    """A server, bucket or credentials that cannot be used: `<path>: <fault>; <remedy>`.

    Unlike a DataError it concerns all samples: none is skipped because of it.
    """

    def __init__(self, path: str | os.PathLike[str], fault: str, remedy: str) -> None:
        self.path, self.fault, self.remedy = os.fspath(path), fault, remedy
        super().__init__(f"{self.path}: {fault}; {remedy}")


class AccessError(DataError):
    """A file or folder that the file system cannot read or write, whatever its content."""

    @staticmethod
    def reading(path: str | os.PathLike[str], error: OSError) -> UnreadableError:
        """Return the error for `error`, raised while reading `path`."""
        link = remedy_for_link(path, error)
        # A path that leads through a file does not exist either.
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError)) and not link
        kind = MissingError if missing else UnreadableError
        remedy = link or _remedy(error)
        return kind(path, f"cannot be read ({error.strerror or error})", remedy)

    @staticmethod
    def writing(
        path: str | os.PathLike[str], error: OSError, fault: str = "cannot be written"
    ) -> AccessError:
        """Return the error for `error`, raised while writing `path`; `fault` is the operation that failed."""
        return AccessError(path, f"{fault} ({error.strerror or error})", _remedy(error))


_REMEDIES = {
    "free some space": (errno.ENOSPC,),
    "free some space, or ask for a larger quota": (errno.EDQUOT,),
    "check the permissions": (errno.EACCES, errno.EPERM),
    "choose a place that may be written": (errno.EROFS,),
    "check the path": (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "raise the limit of the file size (ulimit -f), or choose another place": (errno.EFBIG,),
    "wait for the program that uses it": (errno.EAGAIN, errno.EBUSY, errno.ETXTBSY),
}
"""Remedies by the numbers of the errors."""


def _remedy(error: OSError) -> str:
    """Return the remedy for `error`."""
    if isinstance(error, FileExistsError) and error.filename:  # There is no folder, so none is made.
        name = os.fsdecode(error.filename)
        if os.path.islink(name):
            return f"create {os.readlink(name)}, which the symbolic link {name} leads to, or remove the link"
        return f"remove the file {name}, or choose another place"
    found = (remedy for remedy, numbers in _REMEDIES.items() if error.errno in numbers)
    return next(found, "check its disk or mount, or choose another place")


class UnreadableError(AccessError):
    """A file or folder that cannot be read; others in the same place may still be readable."""


class MissingError(UnreadableError):
    """A file or folder that does not exist."""


def remedy_for_link(path: str | os.PathLike[str], error: OSError) -> str | None:
    """Return the remedy for `error`, raised while reading `path`, if that is a link that leads nowhere."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"restore {os.readlink(path)}, which this symbolic link leads to, or remove the link"
    return None


@contextlib.contextmanager
def reading(path: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Raise UnreadableError of `path`, or of the path that the error names, for an OSError in the body."""
    try:
        yield
    except OSError as error:
        raise AccessError.reading(path or error.filename, error) from error


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise AccessError of `path` for an OSError in the body."""
    try:
        yield
    except OSError as error:
        raise AccessError.writing(path, error) from error


class ConfigError(UserError):
    """A setting that cannot be used.

    The line reads `<key> = <value>: <fault and remedy>`.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key} = {yaml_text(value)}: {remedy}")


def yaml_text(value: object) -> str:
    """Return `value` as a YAML file has it, in one line; anything that YAML does not have, by its `str`."""
    # Errors are rare, and most programs need no YAML otherwise.
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_multi_representer(object, lambda dumper, other: dumper.represent_str(str(other)))
    text: str = yaml.dump(
        value, Dumper=Dumper, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
    )
    return " ".join(text.removesuffix("...\n").split())


def check_field(settings: object, name: str, valid: bool, remedy: str) -> None:
    """Raise ConfigError for the field `name` of `settings` unless it is `valid`."""
    if not valid:
        raise ConfigError(name, getattr(settings, name), remedy)
