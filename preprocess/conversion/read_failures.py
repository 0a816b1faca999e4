"""Source files that cannot be read: a few are faults of their samples, many in a row end the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import MAX_CONSECUTIVE_BAD, AccessError, reading
from pipelines.storage.location import is_url


class ConsecutiveReadFailures:
    """The source files that could not be read since the last one that could."""

    def __init__(self) -> None:
        self._faults: dict[str, str] = {}

    def record(self, unreadable: Mapping[str, str]) -> None:
        """Record the outcome of one more source.

        Args:
            unreadable: The fault of each of its files by path if none could be read; empty otherwise.

        Raises:
            AccessError: More than MAX_CONSECUTIVE_BAD files in a row cannot be read, or not even a folder.
        """
        self._faults = {**self._faults, **unreadable} if unreadable else {}
        # A store that is gone has been asked for a minute.
        paths = (Path(path) for path in unreadable if not is_url(path))
        for folder in {path.parent for path in paths}:
            # Up to the first name: half a million names are too many to list for each file.
            with reading(folder), os.scandir(folder) as names:
                next(names, None)
        if len(self._faults) > MAX_CONSECUTIVE_BAD:
            path, fault = next(reversed(self._faults.items()))
            fault = f"{fault}, and neither can the {len(self._faults) - 1} files before it"
            raise AccessError(path, fault, "check the file system")
