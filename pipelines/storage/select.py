"""The storage of an address."""

from __future__ import annotations

from pathlib import Path

from pipelines.storage.base import Storage
from pipelines.storage.local import LOCAL
from pipelines.storage.location import Location


def storage_of(location: Location) -> Storage:
    """Return the storage that holds `location`.

    Raises:
        ConfigError: It is a URL, and obstore is not installed.
    """
    if isinstance(location, Path):
        return LOCAL
    from pipelines.storage.objects import ObjectStorage

    return ObjectStorage(location.scheme, location.host)
