"""Storage that keeps what it reads on the node's own disk."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from pipelines.errors import DataError, UnreadableError, check_field
from pipelines.filesystem import node_folder
from pipelines.storage.base import FileState, Layer, Result, Storage
from pipelines.storage.cache_folder import CachedSet, Claim, digest_of, open_cached_set
from pipelines.storage.location import Location
from pipelines.storage.requests import COUNTS

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}

_WAIT_SECONDS = 30.0
"""Duration after which what another process is fetching is fetched here too: it may have been stopped."""

_LONGEST_PAUSE = 0.02


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """A cache of samples on each node's own disk.

    Args:
        dir: Folder on each node's own disk. It may contain environment variables, such as $TMPDIR, and is
            shared by all ranks of a node, and by jobs.
        size: Space that it may take, such as "200 GB"; what does not fit is fetched each time.
        fill: Fetch all samples before training, as far as they fit; otherwise each when it is first needed.
    """

    dir: str
    size: str
    fill: bool = False

    def __post_init__(self) -> None:
        number = _SIZE.fullmatch(self.size)
        check_field(self, "size", number is not None, 'expected a number and a unit, such as "200 GB"')
        check_field(self, "size", self.bytes > 0, "must be more than 0")

    @property
    def bytes(self) -> int:
        """`size` in bytes."""
        found = _SIZE.fullmatch(self.size)
        assert found
        return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2]])


@dataclass(frozen=True)
class CachedStorage(Layer):
    """Files of one data set, read once per node.

    What is kept is what was read: a part of a file by its offset and length, or all of it. The version in
    `dataset` tells whether it is still valid; no request is needed for that.

    Attributes:
        config: The cache.
        dataset: Address of the data set, and a version that changes with the content of its files.
        renews: What is kept already is fetched again.
    """

    config: CacheConfig
    dataset: str
    renews: bool = False

    @property
    def keeps(self) -> bool:
        """True if what is read now is kept: not if the cache is full or cannot be used."""
        entries = _entries(self.config, self.dataset, os.getpid())
        return entries is not None and entries.keeps

    @property
    def is_remote(self) -> bool:
        """See `Storage`; also of local files, which are to be read here, and not mapped."""
        return True

    @property
    def few_reads(self) -> bool:
        """See `Storage`; what was guessed to be needed would not be found again with another guess."""
        return False

    def read(self, path: Location, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        return self._get([(path, "all")], lambda _: [self.inner.read(path, direct=direct)])[0]

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        if not length:
            return b""

        def fetch(_: Sequence[int]) -> list[bytes]:
            return [self.inner.read_range(path, offset, length, direct=direct)]

        return self._get([(path, offset, length)], fetch)[0]

    def read_ranges(self, path: Location, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Storage`."""

        def fetch(places: Sequence[int]) -> list[bytes]:
            return self.inner.read_ranges(path, [extents[place] for place in places])

        return self._get([(path, *extent) for extent in extents], fetch)

    def state(self, path: Location) -> FileState:
        """See `Storage`."""
        content = self._get([(path, "state")], lambda _: [json.dumps(self.inner.state(path)).encode()])[0]
        return FileState(*json.loads(content))

    def retry_damaged(self, read: Callable[[Storage], Result]) -> Result:
        """See `Storage`; what was kept of it is fetched again."""
        try:
            return read(self)
        except UnreadableError:
            raise
        except DataError:
            return self.inner.retry_damaged(lambda inner: read(replace(self, inner=inner, renews=True)))

    def _get(
        self, keys: Sequence[tuple[object, ...]], fetch: Callable[[Sequence[int]], list[bytes]]
    ) -> list[bytes]:
        """Return the content of each of `keys`.

        Args:
            keys: Path and extent of each.
            fetch: Returns the contents of those at some places of `keys` that follow each other.
        """
        entries = _entries(self.config, self.dataset, os.getpid())
        if entries is None:
            return fetch(range(len(keys)))
        digests = [digest_of(self.dataset, *key) for key in keys]
        contents: dict[int, bytes] = {}
        end, pause = time.monotonic() + _WAIT_SECONDS, 1e-3
        for digest in digests if self.renews else ():
            entries.drop(digest)
        while True:
            with ExitStack() as claims:
                own: dict[int, Claim] = {}
                for place in (place for place in range(len(keys)) if place not in contents):
                    content, claim = entries.load(digests[place]), None
                    if content is None and (claim := entries.claim(digests[place])):
                        claims.enter_context(claim)
                        # Another one may have kept it just before the claim.
                        content = entries.load(digests[place])
                    if content is not None:
                        contents[place] = content
                        COUNTS.cache_hits += 1
                        COUNTS.cache_bytes += len(content)
                    elif claim:
                        own[place] = claim
                for run in _runs(own):
                    for place, content in zip(run, fetch(run), strict=True):
                        own[place].keep(content)
                        contents[place] = content
            waiting = [place for place in range(len(keys)) if place not in contents]
            if not waiting:
                return [contents[place] for place in range(len(keys))]
            if time.monotonic() > end:
                contents |= {place: fetch([place])[0] for place in waiting}
            else:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)


@functools.cache
def _entries(config: CacheConfig, dataset: str, _process: int) -> CachedSet | None:
    """Return the entries of `dataset`; a forked process opens them anew, for locks of its own."""
    return open_cached_set(node_folder(config.dir, "data.cache.dir"), config.bytes, dataset)


def _runs(places: Iterable[int]) -> list[list[int]]:
    """Return ascending numbers, those together that follow each other."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs
