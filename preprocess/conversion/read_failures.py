"""Source files that cannot be read: one is a fault of its samples, many in a row are the end of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pipelines.errors import MAX_CONSECUTIVE_BAD, AccessError


class Lost:
    """The source files that could not be read since the last one that could."""

    def __init__(self) -> None:
        self._row: dict[str, str] = {}

    def note(self, unread: Mapping[str, str]) -> None:
        """Hear of one more source: the fault of each file by its path if none could be read, else nothing.

        AccessError where a file's folder is gone with it, and after more than MAX_CONSECUTIVE_BAD files.
        """
        self._row = {**self._row, **unread} if unread else {}
        for folder in {Path(path).parent for path in unread}:
            try:
                # To its first name: a folder of half a million is not listed for each file that is lost.
                with os.scandir(folder) as names:
                    next(names, None)
            except OSError as error:
                raise AccessError.reading(folder, error) from error
        if len(self._row) > MAX_CONSECUTIVE_BAD:
            path, fault = next(reversed(self._row.items()))
            said = f"{fault}, nor can the {len(self._row) - 1} files tried before it"
            raise AccessError(path, said, "see what has become of the file system")
