"""Objects of a bucket or container, and files of a web server."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import AccessError, DataError, MissingError, StorageError, UnreadableError
from pipelines.io import WrittenFile
from pipelines.storage.answers import explain
from pipelines.storage.base import FileState, Result, Storage
from pipelines.storage.location import Location, Url
from pipelines.storage.requests import COUNTS, Requests
from pipelines.storage.stores import make_store
from pipelines.storage.uploads import PART_BYTES, delete, upload, upload_stream

_TRANSFERS = 3
"""Number of transfers of what arrives damaged, before it counts as damaged in the store."""


@dataclass(frozen=True)
class ObjectStorage(Storage):
    """Objects by their keys.

    Attributes:
        scheme, host: As of `Url`.
    """

    scheme: str
    host: str

    def read(self, path: Location, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        return self._get(path, None)

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        """See `Storage`."""
        return self._get(path, (offset, offset + length)) if length else b""

    def read_ranges(self, path: Location, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `Storage`; by one request."""
        start = extents[0][0]
        content = self._get(path, (start, sum(extents[-1])))
        return [content[offset - start : offset - start + length] for offset, length in extents]

    @property
    def is_remote(self) -> bool:
        """See `Storage`."""
        return True

    @property
    def lists_folders(self) -> bool:
        """See `Storage`; a web server has files alone."""
        return self.scheme not in ("http", "https")

    def state(self, path: Location) -> FileState:
        """See `Storage`; one of an object that this process has read already takes no request."""
        key, client = _key(path), self._client
        if key not in client.states:
            import obstore

            try:
                meta = client.requests.run(_url(path), lambda: obstore.head_async(client.store, key))
            except StorageError as error:
                if error.__cause__ and explain(error.__cause__).kind == "temporary":
                    raise
                # The answer to a HEAD request has no body, which would give the reason.
                self._get(path, (0, 1))
            else:
                client.states[key] = _state(meta)
        return client.states[key]

    def list(self, folder: Location) -> list[str]:
        """See `Storage`."""
        client, prefix = self._client, _key(folder)
        import obstore

        if not self.lists_folders:
            remedy = "write a manifest for them, with python -m preprocess.verify --write, and upload it"
            raise UnreadableError(folder, "cannot be listed, as it lies on a web server", remedy)
        # A thousand names are a request: half a million take a minute, and one that fails is repeated alone.
        found = client.requests.run(
            _url(folder),
            lambda: obstore.list_with_delimiter_async(client.patient, prefix or None),
            races=False,
        )
        client.states |= {str(meta["path"]): _state(meta) for meta in found["objects"]}
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        names = sorted({path.rstrip("/").rpartition("/")[2] for path in paths})
        if not names:
            raise MissingError(folder, "holds no objects", "check the address")
        return names

    def is_present(self, path: Location) -> bool:
        """See `Storage`."""
        try:
            self.state(path)
        except MissingError:
            with contextlib.suppress(MissingError):
                return self.lists_folders and bool(self.list(path))
            return False
        return True

    def retry_damaged(self, read: Callable[[Storage], Result]) -> Result:
        """See `Storage`."""
        for _ in range(_TRANSFERS - 1):
            try:
                return read(self)
            except AccessError:
                raise
            except DataError:
                COUNTS.retries += 1
        return read(self)

    def write(self, path: Location, *chunks: bytes | memoryview) -> WrittenFile:
        """See `Storage`."""
        return upload(self._writer(path), _url(path), chunks)

    def write_stream(
        self, path: Location, pieces: Iterable[bytes | memoryview], *, sparse: bool = False
    ) -> WrittenFile:
        """See `Storage`."""
        written = upload_stream(self._writer(path), _url(path), pieces)
        # Of parts.
        if written.bytes >= PART_BYTES and (length := self.state(path).bytes) != written.bytes:
            fault = f"cannot be written: the store has {length} bytes of {written.bytes}"
            raise AccessError(path, fault, "try again")
        return written

    def remove(self, path: Location) -> None:
        """See `Storage`."""
        delete(self._writer(path), _url(path))

    def _writer(self, path: Location) -> Any:
        """Return the client that changes the object at `path`, whose known state is forgotten."""
        if not self.lists_folders:
            remedy = "give a folder, or a URL that begins with s3://, gs:// or az://"
            raise AccessError(path, "cannot be written, as it lies on a web server", remedy)
        client = self._client
        client.states.pop(_key(path), None)
        return client.patient

    @property
    def _client(self) -> _Client:
        return _client(self.scheme, self.host)

    def _get(self, path: Location, extent: tuple[int, int] | None) -> bytes:
        """Return the bytes from extent[0] to extent[1] of an object, or all of them.

        Raises:
            DataError: The object has changed since this process has first read it.
        """
        client, key = self._client, _key(path)
        import obstore

        if extent is not None and key in client.states and extent[0] >= client.states[key].bytes:
            return b""

        async def request() -> tuple[FileState | None, bytes]:
            options: Any = {"range": extent} if extent else {}
            try:
                result = await obstore.get_async(client.store, key, options=options)
            except Exception as error:
                if explain(error).kind == "empty range":
                    return None, b""
                raise
            content = bytes(await result.buffer_async())
            COUNTS.bytes += len(content)
            start, stop = result.range
            state, encoding = _state(result.meta), result.attributes.get("Content-Encoding")
            wrong = len(content) != stop - start
            if encoding and (wrong or client.states.get(key, state) != state):
                fault = f"cannot be read: the server sends it compressed ({encoding})"
                raise StorageError(path, fault, "switch that off there, or upload it without an encoding")
            if wrong:
                raise ConnectionResetError("the connection broke off")
            return state, content

        state, content = client.requests.run(_url(path), request)
        if state is not None and client.states.setdefault(key, state) != state:
            fault = f"has changed since it was first read: its ETag was {client.states[key].version}"
            raise DataError(path, f"{fault} and is {state.version}", "restore it, or start again")
        return content


class _Client:
    """The connections of this process to one bucket or web server.

    Attributes:
        states: State of each object as this process has first seen it, by its key.
    """

    def __init__(self, scheme: str, host: str) -> None:
        self._scheme, self._host = scheme, host
        self.store = make_store(scheme, host)
        self.requests = Requests()
        self.states: dict[str, FileState] = {}

    @functools.cached_property
    def patient(self) -> Any:
        """Client that repeats requests itself: for uploads, whose parts it has, and for lists."""
        return make_store(self._scheme, self._host, writes=True)


_client = functools.cache(_Client)


def _url(path: Location) -> Url:
    assert isinstance(path, Url), path
    return path


def _key(path: Location) -> str:
    return _url(path).key


def _state(meta: Any) -> FileState:
    """Return the state that the metadata of an object say; without an ETag its time of change."""
    return FileState(meta["size"], meta["e_tag"] or meta["last_modified"].isoformat())
