"""What a person can cause, said in one line: the thing, its value, the reason and the way out.

Programs catch `UserError` at their outermost door, print it without a traceback and exit with 1;
anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import os

MAX_CONSECUTIVE_BAD = 16
"""Consecutive damaged or unreadable files after which a program stops: so many are no accident."""


class UserError(Exception):
    """An error whose message a user can act on; `str(error)` is one line."""


class DataError(UserError):
    """A file or folder of samples that cannot be used.

    The line reads `<path>: <fault>; <remedy>`.
    """

    def __init__(self, path: str | os.PathLike[str], fault: str, remedy: str) -> None:
        self.path, self.fault, self.remedy = os.fspath(path), fault, remedy
        super().__init__(f"{self.path}: {fault}; {remedy}")

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str]]:
        # Errors travel between ranks and worker processes, so they must survive pickling.
        return type(self), (self.path, self.fault, self.remedy)


class AccessError(DataError):
    """A file or folder that the file system does not give or take: no fault of what is in it."""

    @staticmethod
    def reading(path: str | os.PathLike[str], error: OSError) -> UnreadableError:
        """What to tell of `error`, met while reading `path`."""
        return UnreadableError(path, f"cannot be read ({error.strerror})", "check the path and its rights")

    @staticmethod
    def writing(path: str | os.PathLike[str], error: OSError) -> AccessError:
        """What to tell of `error`, met while writing `path`."""
        return AccessError(
            path, f"cannot be written ({error.strerror})", "check the free space and the rights"
        )


class UnreadableError(AccessError):
    """A file or folder that the file system does not give: others beside it may be there all the same."""


class ConfigError(UserError):
    """A setting that cannot be used.

    The line reads `<key> = <value>: <fault and remedy>`.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key} = {value!r}: {remedy}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str]]:
        return type(self), (self.key, self.value, self.remedy)
