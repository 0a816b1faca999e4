"""Parts of a file that are in memory already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipelines.errors import DataError, UnreadableError
from pipelines.storage.base import Layer, Result, Storage
from pipelines.storage.location import Location


@dataclass(frozen=True)
class Excerpt(Layer):
    """Parts of the file at `path`, and `inner` for everything else.

    Attributes:
        contents: The parts by (offset, length).
    """

    path: Location
    contents: Mapping[tuple[int, int], bytes]

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        content = self.contents.get((offset, length)) if path == self.path else None
        return self.inner.read_range(path, offset, length, direct=direct) if content is None else content

    def retry_damaged(self, read: Callable[[Storage], Result]) -> Result:
        """See `Storage`."""
        try:
            return read(self)
        except UnreadableError:
            raise
        except DataError:
            return self.inner.retry_damaged(read)
